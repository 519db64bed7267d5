"""ONNX element types in PyTorch, and arrays going in and out."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

Array = npt.NDArray[Any]
Value = torch.Tensor | Array | list[Any] | None
"""What flows along an edge: a tensor; an array of strings; a sequence; an absent optional."""

STORAGE: Final[Mapping[ir.DataType, torch.dtype]] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
    # PyTorch has no arithmetic below 8 bits: one element in a byte, in the type's own range.
    ir.DataType.INT4: torch.int8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.FLOAT4E2M1: torch.float32,
}
"""How elements of each ONNX type are kept."""

SCARCE: Final = frozenset({ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64})
"""Types that PyTorch can move about but hardly compute with."""

HALVES: Final = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_COMPUTE: Final = HALVES | {ir.DataType.FLOAT}
# Same bits, for types that one of NumPy and PyTorch lacks.
_BITS: Final[Mapping[torch.dtype, torch.dtype]] = {
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
}


@dataclass(frozen=True, slots=True)
class ElementTypes:
    """Which PyTorch type each ONNX element type becomes in one program.

    Attributes:
        compute: Type in place of the model's own float type, or None to keep all types.
        main_is_half: Whether the model's weights are of 16 bits; FLOAT in it is then an island
            that was put there for its precision, and stays one.
    """

    compute: torch.dtype | None = None
    main_is_half: bool = False

    def of(self, dtype: ir.DataType) -> torch.dtype:
        """Return the PyTorch type of an ONNX one."""
        stored = STORAGE[dtype]
        if self.compute is None or dtype not in _COMPUTE:
            return stored
        if dtype is ir.DataType.FLOAT and self.main_is_half and self.compute.itemsize < 4:
            return stored
        return self.compute

    def convert(self, tensor: torch.Tensor, dtype: ir.DataType) -> torch.Tensor:
        """Return a tensor in the program's type; finite values stay finite."""
        wanted = self.of(dtype)
        if tensor.dtype == wanted:
            return tensor
        if tensor.is_floating_point() and wanted.is_floating_point:
            # Masks hold the lowest float32, which would become -inf in float16.
            limit = torch.finfo(wanted).max
            if limit < torch.finfo(tensor.dtype).max:
                tensor = torch.where(tensor.isfinite(), tensor.clamp(-limit, limit), tensor)
        return tensor.to(wanted)


def to_torch(array: Array) -> torch.Tensor:
    """Return a tensor of an array's elements; `ml_dtypes` below 8 bits take a byte each.

    The tensor may share the array's memory.
    """
    name = array.dtype.name
    if name in ("int4", "int2"):
        return torch.from_numpy(array.astype(np.int8))
    if name in ("uint4", "uint2"):
        return torch.from_numpy(array.astype(np.uint8))
    if name == "float4_e2m1fn":
        return torch.from_numpy(array.astype(np.float32))
    stored = STORAGE[ir.DataType.from_numpy(array.dtype)]
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    with warnings.catch_warnings():
        # Nothing here writes into weights, so that an array may be read-only does not matter.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        if stored in _BITS:
            bits = np.int16 if _BITS[stored] is torch.int16 else np.uint8
            return torch.from_numpy(contiguous.view(bits)).view(stored)
        return torch.from_numpy(contiguous)


def texts_of(tensor: ir.TensorProtocol) -> Array:
    """Return a string tensor as an object array of `str`."""
    texts = [each.decode() for each in cast(ir.StringTensor, tensor).string_data()]
    return np.array(texts, dtype=object).reshape(tensor.shape.numpy())


def to_numpy(value: Value, dtype: ir.DataType | None = None) -> Any:
    """Return a value as NumPy has it: an array, a list of them, or None.

    Args:
        value: What an edge carries.
        dtype: ONNX element type, where the tensor's own does not tell it.
    """
    if value is None or isinstance(value, np.ndarray):
        return value
    if isinstance(value, list):
        return [to_numpy(item, dtype) for item in value]
    tensor = value.detach().cpu()
    if tensor.dtype in _BITS:
        own = _ONNX_OF[tensor.dtype]
        array: Array = tensor.contiguous().view(_BITS[tensor.dtype]).numpy().view(own.numpy())
    else:
        array = tensor.numpy()
    if dtype is None or dtype is ir.DataType.STRING:
        return array
    wanted = dtype.numpy()
    return array if array.dtype == wanted else array.astype(wanted)


_ONNX_OF: Final[Mapping[torch.dtype, ir.DataType]] = {
    stored: dtype for dtype, stored in reversed(list(STORAGE.items())) if dtype.bitwidth >= 8
}


def onnx_type(dtype: torch.dtype) -> ir.DataType:
    """Return the ONNX element type that a PyTorch type stands for."""
    return _ONNX_OF[dtype]
