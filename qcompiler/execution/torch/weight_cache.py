"""Weights of a program, loaded when a step first reads them."""

from collections.abc import Iterable

import onnx_ir as ir
import torch

from qcompiler.execution.torch.element_types import ElementTypes, Value, texts_of, to_torch
from qcompiler.ir.dataflow import constant_of
from qcompiler.ir.weights import read_all

_SMALL = 64
"""Integers of up to this many elements are shapes and indices: they stay on the CPU."""
_INDEX_TYPES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


class WeightCache:
    """Constants as tensors on the program's device.

    A tensor is read from the model (or its data file) when it is first asked for, converted, and
    kept unless the program streams its weights.
    """

    def __init__(
        self, elements: ElementTypes, device: torch.device, host: Iterable[ir.Value], *, keep: bool
    ) -> None:
        """Start with nothing loaded.

        Args:
            elements: PyTorch types of the program.
            device: Where weights go.
            host: Constants that are only read as Python numbers.
            keep: Whether a loaded weight stays until `release`.
        """
        self._elements = elements
        self._device = device
        self._host = frozenset(host)
        self._keep = keep
        self._loaded: dict[ir.Value, Value] = {}

    def get(self, value: ir.Value) -> Value:
        """Return a constant: a tensor, or an array of strings."""
        tensor = self._loaded.get(value)
        if tensor is None:
            tensor = self._load(value)
            if self._keep:
                self._loaded[value] = tensor
        return tensor

    def release(self) -> None:
        """Forget what was loaded; it is read again when needed."""
        self._loaded.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are loaded now."""
        return sum(each.nbytes for each in self._loaded.values() if isinstance(each, torch.Tensor))

    def _load(self, value: ir.Value) -> Value:
        stored = constant_of(value)
        assert stored is not None  # plans ask for constants only
        if stored.dtype is ir.DataType.STRING:
            return texts_of(stored)
        tensor = to_torch(read_all(stored))
        if value in self._host:
            # Scales of a Resize are numbers, not values: the program's float type is not theirs.
            return tensor
        tensor = self._elements.convert(tensor, stored.dtype)
        small = stored.dtype in _INDEX_TYPES and tensor.numel() <= _SMALL
        return tensor if small else tensor.to(self._device)
