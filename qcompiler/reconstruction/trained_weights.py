"""Codes and step sizes of a weight as numbers that can be learned.

A weight is `(codes - zero) * scale * exp(t)`, with t learned for every scale. Codes stand on the
grid of the start scales, so that learning a step size flips none of them (TesseraQ does the same).
What rounds to a code is called its position: `w / scale + zero`, moved into the cell of the start
code where that is not the nearest one, as after GPTQ.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.execution.torch.element_types import STORAGE, to_torch
from qcompiler.ir.weights import read_all
from qcompiler.quant.reconstruction import BlockReconstruction, Learned, Rounding
from qcompiler.reconstruction.scale_grid import ScaleGrid, rounded_to
from qcompiler.reconstruction.starting_point import CodedWeight
from qcompiler.reconstruction.trained import LEAST_FACTOR, Trained

Array = npt.NDArray[Any]

STRETCH: Final = (-0.1, 1.1)
"""Ends of AdaRound's rectified sigmoid (Nagel et al. 2020, arXiv 2004.10568)."""
_CELL: Final = 0.45
"""How far from a code its position may start."""


@dataclass(frozen=True, slots=True, eq=False)
class Hardened:
    """A weight as the graph will hold it.

    Attributes:
        codes: int8 or uint8, of the weight's shape.
        scale: float32 holding numbers of the type scales are stored in.
        flipped: Codes that are not those of the start.
        moved: Scales that are not those of the start.
    """

    codes: Array
    scale: Array
    flipped: int
    moved: int


class _Dequantized(torch.autograd.Function):
    """`steps * scale`, steps of integers; as few passes over the weight as there can be."""

    @staticmethod
    def forward(context: Any, steps: Tensor, scale: Tensor) -> Tensor:
        context.save_for_backward(steps, scale)
        return steps * scale

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        steps, scale = context.saved_tensors
        (gradient,) = gradients
        return None, (gradient * steps).sum_to_size(scale.shape)


class _Rounded(torch.autograd.Function):
    """`(clamp(round(position)) - zero) * scale`, the rounding a straight line for the gradient.

    Positions are held within the range of codes by `TrainedWeight.confine`, so that none of them
    has to be left out.
    """

    @staticmethod
    def forward(
        context: Any, position: Tensor, scale: Tensor, zero: Tensor, low: int, high: int
    ) -> Tensor:
        steps = position.round().clamp_(low, high).sub_(zero)
        context.save_for_backward(steps, scale)
        return steps * scale

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        steps, scale = context.saved_tensors
        (gradient,) = gradients
        to_scale = (gradient * steps).sum_to_size(scale.shape)
        return gradient * scale, to_scale, None, None, None


class TrainedWeight(Trained):
    """The learned numbers of one weight, in float32.

    Attributes:
        weight: The weight.
        factors: t, of the shape of the scales.
        matrices: What positions are learned by; empty where codes stay.
    """

    def __init__(
        self, weight: CodedWeight, how: BlockReconstruction, device: torch.device, seed: int
    ) -> None:
        """Start from the codes and scales that the graph holds.

        Args:
            weight: Its codes may be those of any rounding.
            how: What is learned. Codes that kernels read in pairs stay (`quant.scheme.PairLimit`).
            device: Where it is computed.
            seed: Of the random half of `lora`.
        """
        self.weight = weight
        self._device = device
        self._rounding = how.rounding
        spec = weight.spec
        self._low = spec.qtype.qmin if spec.pairs is None else -spec.qtype.qmax
        self._high = spec.qtype.qmax
        self._learned = how.learned if spec.pairs is None else Learned.STEP_SIZES
        self._grid = ScaleGrid(weight.rows.shape, spec.granularity)
        self._stored = STORAGE[weight.tensor.dtype]
        codes = _read(weight.codes)
        self._codes = codes.to(device)
        self._scale = _read(weight.scale).to(device, torch.float32)
        self._zero = torch.zeros_like(self._scale)
        if weight.zero_point is not None:
            self._zero = _read(weight.zero_point).to(device, torch.float32)
        self.factors = torch.zeros_like(self._scale).requires_grad_()
        self.matrices: list[Tensor] = []
        self._base: Tensor | None = None
        if self._learned is Learned.STEP_SIZES:
            self._steps = self._first_steps()
        else:
            self._start_positions(how.rank, seed)

    def _first_steps(self) -> Tensor:
        """Return start codes less zero points, split; 16 bits hold them."""
        grid = self._grid
        zero = grid.spread(self._zero).to(torch.int16)
        return grid.split(self._codes).to(torch.int16) - zero

    def _start_positions(self, rank: int, seed: int) -> None:
        position = self._first_position()
        if self._rounding is Rounding.SOFT:
            floor = position.floor()
            low, high = STRETCH
            fraction = (position - floor).clamp_(0.01, 0.99)
            position = -torch.log((high - low) / (fraction - low) - 1)
            self._floor = floor.to(torch.int16)
        if self._learned is Learned.FULL:
            self.matrices = [position.requires_grad_()]
            return
        rows = self.weight.rows
        random = torch.Generator().manual_seed(seed)
        thin = torch.randn(rows.count, rank, generator=random) / sqrt(rank)
        self._base = position
        self.matrices = [
            thin.to(self._device).requires_grad_(),
            torch.zeros(rank, rows.width, device=self._device).requires_grad_(),
        ]

    def _first_position(self) -> Tensor:
        """Return positions that round to the start codes, as near to the float weight as can be."""
        grid = self._grid
        exact = to_torch(read_all(self.weight.tensor)).to(self._device).to(torch.float32)
        position = grid.split(exact) / grid.spread(self._scale) + grid.spread(self._zero)
        codes = grid.split(self._codes).to(torch.float32)
        return grid.join(torch.maximum(torch.minimum(position, codes + _CELL), codes - _CELL))

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._codes.numel()

    def scale(self) -> Tensor:
        """Return the scales, as they will be stored."""
        return rounded_to(self._scale * self.factors.exp(), self._stored)

    def values(self) -> Tensor:
        """Return what the weight is now, of its shape; gradients reach the learned numbers."""
        grid = self._grid
        scale, zero = grid.spread(self.scale()), grid.spread(self._zero)
        found: Tensor
        if not self.matrices:
            found = _Dequantized.apply(self._steps, scale)  # type: ignore[no-untyped-call]
        elif self._rounding is Rounding.HARD:
            position = grid.split(self._position())
            found = _Rounded.apply(  # type: ignore[no-untyped-call]
                position, scale, zero, self._low, self._high
            )
        else:
            codes = (self._floor + self._share()).clamp(self._low, self._high)
            found = (grid.split(codes) - zero) * scale
        return grid.join(found)

    def regularizer(self, exponent: float) -> Tensor | None:
        """Return the sum of `1 - |2 d - 1|^exponent` over what codes are above their floor.

        None where nothing is undecided.
        """
        if self._rounding is Rounding.HARD or not self.matrices:
            return None
        return (1 - (2 * self._share() - 1).abs().pow(exponent)).sum()

    def confine(self) -> None:
        """Put positions that left the range of codes back to its ends, and keep scales usable."""
        with torch.no_grad():
            if self._learned is Learned.FULL and self._rounding is Rounding.HARD:
                self.matrices[0].clamp_(self._low - 0.5, self._high + 0.5)
            if self.weight.spec.pairs is not None:
                self.factors.clamp_(min=LEAST_FACTOR)

    def _position(self) -> Tensor:
        if self._base is None:
            return self.matrices[0]
        shape = [self.weight.rows.shape[axis] for axis in self.weight.rows.order]
        product = (self.matrices[0] @ self.matrices[1]).reshape(shape)
        back = np.argsort(self.weight.rows.order).tolist()
        position = self._base + product.permute(back)
        # A product cannot be put back, as single positions are: those outside do not move.
        return position.clamp(self._low - 0.5, self._high + 0.5)

    def _share(self) -> Tensor:
        low, high = STRETCH
        return (torch.sigmoid(self._position()) * (high - low) + low).clamp(0, 1)

    def codes(self) -> Tensor:
        """Return the codes that positions round to, in the type they are kept in."""
        with torch.no_grad():
            if not self.matrices:
                return self._codes
            if self._rounding is Rounding.SOFT:
                found = (self._floor + (self._share() >= 0.5)).clamp(self._low, self._high)
            else:
                found = self._position().round().clamp(self._low, self._high)
            return found.to(self._codes.dtype)

    def hard_values(self) -> Tensor:
        """Return what the weight is once it is hardened."""
        grid = self._grid
        with torch.no_grad():
            steps = grid.split(self.codes()).to(torch.float32) - grid.spread(self._zero)
            return grid.join(steps * grid.spread(self.scale()))

    def flipped(self) -> int:
        """Return how many codes are not those of the start."""
        return int((self.codes() != self._codes).sum())

    def harden(self) -> Hardened:
        """Return codes and scales for the graph."""
        with torch.no_grad():
            codes, scale = self.codes(), self.scale()
            return Hardened(
                codes.cpu().numpy(),
                scale.cpu().numpy(),
                int((codes != self._codes).sum()),
                int((scale != self._scale).sum()),
            )

    def parameters(self) -> tuple[Tensor, ...]:
        """Return all that is learned."""
        return (self.factors, *self.matrices)


def _read(value: ir.Value) -> Tensor:
    tensor = value.const_value
    assert tensor is not None
    return to_torch(read_all(tensor))
