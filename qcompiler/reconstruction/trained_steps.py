"""Step sizes of quantized activations as numbers that can be learned."""

import torch
from torch import Tensor

from qcompiler.execution.torch.element_types import STORAGE, to_torch
from qcompiler.ir.weights import read_all
from qcompiler.reconstruction.scale_grid import rounded_to
from qcompiler.reconstruction.trained import LEAST_FACTOR, Trained
from qcompiler.reconstruction.windows import StepSize


class TrainedStep(Trained):
    """The step size of one activation, in float32: the calibrated one times `exp(t)`.

    Attributes:
        step: Where it stands.
        factor: t.
    """

    def __init__(self, step: StepSize, device: torch.device) -> None:
        """Start from the calibrated step size.

        Args:
            step: Where it stands.
            device: Where it is computed.
        """
        self.step = step
        tensor = step.scale.const_value
        assert tensor is not None
        self._stored = STORAGE[tensor.dtype]
        self._start = to_torch(read_all(tensor)).to(device, torch.float32)
        self.factor = torch.zeros_like(self._start).requires_grad_()

    def value(self) -> Tensor:
        """Return the step size, as it will be stored."""
        return rounded_to(self._start * self.factor.exp(), self._stored)

    def confine(self) -> None:
        """Keep it large enough for what is added to products."""
        with torch.no_grad():
            self.factor.clamp_(min=LEAST_FACTOR)

    def parameters(self) -> tuple[Tensor, ...]:
        """Return what is learned."""
        return (self.factor,)
