"""Constants in a 16-bit type: what they hold, and their rounding, slice by slice."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.float_types import data_type_of
from qcompiler.ir.weights import WeightStore, read_all, read_slice
from qcompiler.quant.compute_type import ComputeType

Array = npt.NDArray[Any]

_SLICE_BYTES: Final = 24 << 20
_SHARE: Final = 16
"""One part in so many of the memory budget is for a slice: several copies of it exist at once."""


@dataclass(frozen=True, slots=True)
class ConstantFacts:
    """What a float constant holds; NaN and infinities left out.

    Attributes:
        low: Smallest number, at most 0.
        high: Largest number, at least 0.
        tiny: Smallest magnitude other than 0; infinite where all are 0.
    """

    low: float
    high: float
    tiny: float

    @property
    def peak(self) -> float:
        """Largest magnitude."""
        return max(-self.low, self.high)


class ConstantCaster:
    """Surveys and rounds the constants of one model; each tensor once, however often it is used.

    Args:
        store: Where rounded weights go.
        compute: The 16-bit type.
        memory_budget: Bytes the process may take.
        done: Called with the bytes that were read.
    """

    def __init__(
        self,
        store: WeightStore,
        compute: ComputeType,
        memory_budget: int,
        done: Callable[[float], None],
    ) -> None:
        self._store = store
        self._compute = compute
        self._slice = max(1 << 16, min(_SLICE_BYTES, memory_budget // _SHARE))
        self._done = done
        self._facts: dict[object, ConstantFacts] = {}
        self._made: dict[tuple[object, float], ir.TensorProtocol] = {}
        self._kept: list[ir.TensorProtocol] = []

    def facts(self, tensor: ir.TensorProtocol) -> ConstantFacts:
        """Return what a tensor holds.

        Raises:
            ModelError: External data cannot be read.
        """
        key = self._key(tensor)
        if key not in self._facts:
            low, high, tiny = 0.0, 0.0, np.inf
            for _, _, values in self._slices(tensor):
                kept = values[np.isfinite(values)]
                low = min(low, float(kept.min(initial=0.0)))
                high = max(high, float(kept.max(initial=0.0)))
                size = np.abs(kept)
                tiny = min(tiny, float(size[size > 0].min(initial=np.inf)))
            self._facts[key] = ConstantFacts(low, high, tiny)
        return self._facts[key]

    def rounded(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Return a tensor in the 16-bit type; what is finite stays finite.

        Raises:
            ModelError: External data cannot be read.
            UsageError: The disk is full.
        """
        key = (self._key(tensor), 0.0)
        if key not in self._made:
            dtype = data_type_of(self._compute)
            self._made[key] = self._map(tensor, dtype, self._compute.largest)
        return self._made[key]

    def coarse(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Return a float32 tensor of the numbers that `rounded` gives."""
        values = read_all(self.rounded(tensor)).astype(np.float32)
        return self._store.put(tensor.name or "", values, ir.DataType.FLOAT)

    def clipped(self, tensor: ir.TensorProtocol, limit: float) -> ir.TensorProtocol:
        """Return a float32 tensor whose finite numbers have magnitudes up to a limit."""
        key = (self._key(tensor), limit)
        if key not in self._made:
            self._made[key] = self._map(tensor, ir.DataType.FLOAT, limit)
        return self._made[key]

    def _map(
        self, tensor: ir.TensorProtocol, dtype: ir.DataType, limit: float
    ) -> ir.TensorProtocol:
        shape = tensor.shape.numpy()
        writer = self._store.open_tensor(tensor.name or "", dtype, shape)
        element = dtype.numpy()
        for axis, start, values in self._slices(tensor):
            # An infinity means one: a mask, or a sentinel.
            bounded = np.where(np.isfinite(values), np.clip(values, -limit, limit), values)
            writer.write_slice(axis, start, bounded.astype(element))
        return writer.finish()

    def _slices(self, tensor: ir.TensorProtocol) -> Iterator[tuple[int, int, Array]]:
        """Yield axis, start and float32 values of slices that fit the memory."""
        shape = tensor.shape.numpy()
        if not shape:
            yield 0, 0, tensor.numpy().reshape(1).astype(np.float32)
            return
        if 0 in shape:
            return
        axis = _longest_leading(shape, self._slice)
        row = max(1, tensor.nbytes // shape[axis])
        step = max(1, self._slice // row)
        for start in range(0, shape[axis], step):
            values = read_slice(tensor, axis, start, min(start + step, shape[axis]))
            yield axis, start, values.astype(np.float32, copy=False)
            self._done(values.nbytes)

    def _key(self, tensor: ir.TensorProtocol) -> object:
        if isinstance(tensor, ir.ExternalTensor):
            return (str(tensor.path), tensor.offset, tensor.nbytes, tuple(tensor.shape.numpy()))
        # The identity stands for the tensor only as long as the tensor lives.
        self._kept.append(tensor)
        return id(tensor)


def _longest_leading(shape: Sequence[int], limit: int) -> int:
    """Return the axis to cut: the first, unless one row of it is larger than a slice may be."""
    row = 4 * int(np.prod(shape[1:], dtype=np.int64))
    return 0 if row <= limit else int(np.argmax(shape))
