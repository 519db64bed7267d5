"""NumPy reference of ONNX QuantizeLinear and DequantizeLinear.

    code  = saturate(round_half_even(value / scale) + zero_point)
    value = (code - zero_point) * scale

Codes of 8-bit floats are the nearest number of their type, half to the even mantissa.

The quotient is rounded to the type of values and scale, as ONNX says (QuantizeLinear-23, default
`precision`) and ONNX Runtime does for float16 too; where the two types differ it stays float32, and
where codes are floats of 8 bits (measured in ONNX Runtime). The product is rounded once, to the
type of the scale. What ONNX leaves open is defined here: NaN and infinite values, and scales that
are not positive and finite, are refused.
"""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompiler.quant.granularity import Granularity
from qcompiler.quant.grouping import Array, boxes, scale_sections, value_sections
from qcompiler.quant.packing import IntArray
from qcompiler.quant.qtype import QType
from qcompiler.quant.scheme import QSpec

FLOAT_DTYPES: tuple[np.dtype[Any], ...] = (
    np.dtype(np.float32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
)
"""Float types that values and scales may have."""

_LIMITS: dict[np.dtype[Any], tuple[float, float]] = {
    np.dtype(np.float32): (2.0**-126, (2 - 2.0**-23) * 2.0**127),
    np.dtype(np.float16): (2.0**-14, 65504.0),
    np.dtype(ml_dtypes.bfloat16): (2.0**-126, (2 - 2.0**-7) * 2.0**127),
}
"""Smallest normal and largest finite number of each type."""

_TILE = 1 << 16


def quantize(values: Array, scale: Array, zero_point: IntArray | None, spec: QSpec) -> IntArray:
    """Return the codes of `values`.

    Args:
        values: float32, float16 or bfloat16 of any shape.
        scale: Any of these types, shape `scale_shape(values.shape, spec.granularity)`.
        zero_point: Shape of `scale`, integer; None is 0.
        spec: Integer type and granularity. Its `symmetric` is not consulted.

    Returns:
        Array of `code_dtype(spec.qtype)` and the shape of `values`, one code per element, within
        `spec.qtype.qmin..qmax`.

    Raises:
        ValueError: A value is NaN or infinite, a scale is not positive and finite, a zero point
            is outside the range, or a shape or dtype does not fit.
    """
    check_float_dtype(values.dtype, "values")
    check_scale(scale)
    qtype = spec.qtype
    # float32 holds enough bits that rounding its quotient gives the narrow type's own quotient.
    same = values.dtype == scale.dtype and not qtype.floating
    narrow = values.dtype if same else np.dtype(np.float32)
    codes = np.empty(values.shape, code_dtype(qtype))
    for value, code, one_scale, zero in _sections(values, codes, scale, zero_point, spec):
        for box in boxes(value.shape, _TILE):
            tile = np.array(value[box], np.float32)
            if not np.isfinite(tile).all():
                message = "values hold NaN or infinity"
                raise ValueError(message)
            with np.errstate(over="ignore"):
                np.divide(tile, _part(one_scale, box).astype(np.float32), out=tile)
                tile[...] = tile.astype(narrow, copy=False)
            if not qtype.floating:  # storing them rounds floats
                np.rint(tile, out=tile)
            if zero is not None:
                tile += _part(zero, box).astype(np.float32)
            np.clip(tile, qtype.qmin, qtype.qmax, out=tile)
            code[box] = tile
    return codes


def dequantize(
    codes: IntArray, scale: Array, zero_point: IntArray | None, granularity: Granularity
) -> Array:
    """Return the values that codes stand for.

    Args:
        codes: int8, uint8 or float8_e4m3fn of any shape, one code per element.
        scale: float32, float16 or bfloat16, shape `scale_shape(codes.shape, granularity)`.
        zero_point: Shape of `scale`, integer; None is 0.
        granularity: How many elements share a scale.

    Returns:
        Array of the shape of `codes` and the dtype of `scale`. A product beyond the type's largest
        number is infinite, as in ONNX Runtime.

    Raises:
        ValueError: A scale is not positive and finite, or a shape or dtype does not fit.
    """
    check_scale(scale)
    values = np.empty(codes.shape, scale.dtype)
    value_parts = value_sections(values, granularity)
    code_parts = value_sections(codes, granularity)
    scale_parts = scale_sections(scale, codes.shape, granularity)
    for index, value in enumerate(value_parts):
        zeros = (
            None
            if zero_point is None
            else scale_sections(zero_point, codes.shape, granularity)[index]
        )
        for box in boxes(value.shape, _TILE):
            tile = np.array(code_parts[index][box], np.float32)
            if zeros is not None:
                tile -= _part(zeros, box).astype(np.float32)
            with np.errstate(over="ignore"):
                tile *= _part(scale_parts[index], box).astype(np.float32)
                value[box] = tile.astype(scale.dtype)
    return values


def code_dtype(qtype: QType) -> np.dtype[Any]:
    """Return the NumPy type that holds one code of a type per element."""
    integer = np.int8 if qtype.signed else np.uint8
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn if qtype.floating else integer)
    return dtype


def round_scale(scale: Array, dtype: npt.DTypeLike) -> Array:
    """Round wished-for scales to the type that stores them, and keep them usable.

    Args:
        scale: float32 or float64 of any shape, not negative. 0 means that the group is all zero.
        dtype: float32, float16 or bfloat16.

    Returns:
        Array of `dtype`: 1.0 where `scale` is 0; elsewhere clamped to the type's smallest normal
        number (kernels may flush subnormal numbers to zero) and its largest finite one.
    """
    smallest, largest = _LIMITS[np.dtype(dtype)]
    clamped = np.clip(scale, smallest, largest, dtype=np.float64)
    return np.where(scale == 0, 1.0, clamped).astype(dtype)


def check_float_dtype(dtype: np.dtype[Any], what: str) -> None:
    """Refuse a type that QuantizeLinear does not read.

    Raises:
        ValueError: The dtype is not float32, float16 or bfloat16.
    """
    if dtype not in FLOAT_DTYPES:
        message = f"{what} are {dtype}, not float32, float16 or bfloat16"
        raise ValueError(message)


def check_scale(scale: Array) -> None:
    """Refuse scales that no tensor can be divided by.

    Raises:
        ValueError: The dtype is not a supported float type, or an element is not positive and
            finite.
    """
    check_float_dtype(scale.dtype, "scales")
    wide = scale.astype(np.float32)
    if not ((wide > 0) & np.isfinite(wide)).all():
        message = "a scale is not positive and finite"
        raise ValueError(message)


def _sections(
    values: Array, codes: IntArray, scale: Array, zero_point: IntArray | None, spec: QSpec
) -> list[tuple[Array, Array, Array, Array | None]]:
    """Return the sections of the four tensors, zipped."""
    scales = scale_sections(scale, values.shape, spec.granularity)
    zeros: tuple[Array | None, ...] = (None,) * len(scales)
    if zero_point is not None:
        inside = (zero_point >= spec.qtype.qmin) & (zero_point <= spec.qtype.qmax)
        if not inside.all():
            message = f"a zero point is outside {spec.qtype.qmin}..{spec.qtype.qmax}"
            raise ValueError(message)
        zeros = scale_sections(zero_point, values.shape, spec.granularity)
    parts = value_sections(values, spec.granularity), value_sections(codes, spec.granularity)
    return list(zip(*parts, scales, zeros, strict=True))


def _part(scale_section: Array, box: tuple[slice, ...]) -> Array:
    """Return the scales of the groups of a box."""
    return scale_section[(slice(None), slice(None), *box[2:])]
