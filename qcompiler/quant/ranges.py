"""Choosing scales and zero points for a whole tensor, without data."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from qcompiler.quant.arithmetic import check_float_dtype, code_dtype, dequantize, quantize
from qcompiler.quant.clipping import GridSearch
from qcompiler.quant.granularity import PerBlock, PerTensor, scale_shape
from qcompiler.quant.grouping import Array, scale_sections, value_sections
from qcompiler.quant.packing import IntArray
from qcompiler.quant.pairs import quantize_rows, reduction_rows, restore_rows
from qcompiler.quant.scheme import PairLimit, QSpec
from qcompiler.quant.tiles import strips


class RangeMethod(StrEnum):
    """How the range of a scale group is chosen."""

    MIN_MAX = "min-max"
    """The whole range of the group: nothing saturates but by the rounding of the scale."""
    MSE = "mse"
    """The range of least squared error that the search finds; never worse than min-max."""
    WEIGHTED_MSE = "weighted-mse"
    """The same for the error in which a value v counts |v| + rms(group) times. On language models
    it gave the lowest perplexity of the three (benchmarks/README.md). At 8 and 7 bits, where next
    to nothing is clipped, it is MSE."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A tensor as codes.

    Attributes:
        codes: int8, uint8 or float8_e4m3fn, shape of the values, one code per element.
        scale: Shape `scale_shape(values.shape, granularity)`, of the dtype asked for.
        zero_point: Shape of `scale`, dtype of `codes`; None for symmetric signed types. Symmetric
            unsigned types have it mid-range, since ONNX reads an absent one as 0.
        squared_error: Sum over elements of (value - dequantized value)².
        squared_signal: Sum over elements of value².
    """

    codes: IntArray
    scale: Array
    zero_point: IntArray | None
    squared_error: float
    squared_signal: float


def sqnr_db(squared_signal: float, squared_error: float) -> float:
    """Return the signal to quantization noise ratio in dB; inf where there is no error."""
    if squared_error == 0:
        return float("inf")
    if squared_signal == 0 or squared_error == float("inf"):
        return float("-inf")
    return float(10 * (np.log10(squared_signal) - np.log10(squared_error)))


def quantize_tensor(
    values: Array,
    spec: QSpec,
    method: RangeMethod,
    scale_dtype: npt.DTypeLike,
    least_scale: Array | None = None,
) -> QuantizedTensor:
    """Choose scales (and zero points) for `values` and round them to codes.

    Codes are those of `arithmetic.quantize` on the values as float32, with the scale as rounded to
    `scale_dtype`: half types are widened first, for the codes nearest to them. A group of zeros
    gets scale 1.0; scales below the type's smallest normal number are raised to it. Quantizing a
    slice that cuts no group gives the slice of the result.

    Args:
        values: float32, float16 or bfloat16 of any shape. An array that is not contiguous is
            copied where the axes before or after the granularity's cannot be merged in place.
        spec: Integer type, granularity and symmetry.
        method: How ranges are chosen.
        scale_dtype: float32, float16 or bfloat16.
        least_scale: float32, of the shape of the scale: below it no scale may be. For types with
            limited pairs only.

    Raises:
        ValueError: A value is NaN or infinite, a dtype is not supported, or the granularity does
            not fit the shape.
    """
    check_float_dtype(values.dtype, "values")
    check_float_dtype(np.dtype(scale_dtype), "scales")
    if spec.pairs is not None:
        return _quantize_pairs(values, spec, spec.pairs, scale_dtype, least_scale)
    qtype = spec.qtype
    shape = scale_shape(values.shape, spec.granularity)
    codes = np.empty(values.shape, code_dtype(qtype))
    scale = np.empty(shape, scale_dtype)
    # Floats of 8 bits have none.
    zero_point = np.empty(shape, np.int8 if qtype.signed else np.uint8)
    absent = spec.symmetric and qtype.signed
    search = GridSearch(
        spec,
        np.dtype(scale_dtype),
        clip=method is not RangeMethod.MIN_MAX,
        weighted=method is RangeMethod.WEIGHTED_MSE,
    )
    if values.size == 0:
        scale.fill(1)
        zero_point.fill(search.middle)
        return QuantizedTensor(codes, scale, None if absent else zero_point, 0.0, 0.0)
    per_tensor = isinstance(spec.granularity, PerTensor)
    signal = error = 0.0
    for value_part, code_part, scale_part, zero_part in zip(
        value_sections(values, spec.granularity),
        value_sections(codes, spec.granularity),
        scale_sections(scale, values.shape, spec.granularity),
        scale_sections(zero_point, values.shape, spec.granularity),
        strict=True,
    ):
        for strip in strips(value_part, per_tensor=per_tensor):
            # A scale type too narrow for the values makes sums infinite, which is the truth.
            with np.errstate(over="ignore", invalid="ignore"):
                chosen = search.quantize_strip(strip, code_part)
            scale_place, zero_place = scale_part[0, 0][strip.groups], zero_part[0, 0][strip.groups]
            scale_place[...] = chosen.scale.reshape(scale_place.shape)
            zero_place[...] = chosen.zero.reshape(zero_place.shape)
            signal += chosen.squared_signal
            error += chosen.squared_error
    return QuantizedTensor(codes, scale, None if absent else zero_point, error, signal)


def quantize_slice(values: Array, spec: QSpec, scale: Array) -> QuantizedTensor:
    """Round a slice of a tensor whose one scale was found over all of its slices.

    Args:
        values: float32, float16 or bfloat16; where pairs are limited, with whole reduction rows.
        spec: Signed type, per tensor, symmetric.
        scale: Of shape `[]`: the largest of those that `quantize_tensor` gives the slices.

    Raises:
        ValueError: A value is NaN or infinite, or the type has a zero point.
    """
    if not (spec.symmetric and spec.qtype.signed and isinstance(spec.granularity, PerTensor)):
        message = "slices share a scale in signed symmetric per-tensor types only"
        raise ValueError(message)
    if spec.pairs is not None:
        least = scale.astype(np.float32)
        return _quantize_pairs(values, spec, spec.pairs, scale.dtype, least)
    codes = quantize(values, scale, None, spec)
    exact = values.astype(np.float32)
    error = dequantize(codes, scale, None, spec.granularity).astype(np.float32) - exact
    return QuantizedTensor(
        codes,
        scale,
        None,
        float(np.square(error, dtype=np.float64).sum()),
        float(np.square(exact, dtype=np.float64).sum()),
    )


def _quantize_pairs(
    values: Array,
    spec: QSpec,
    pairs: PairLimit,
    scale_dtype: npt.DTypeLike,
    least_scale: Array | None,
) -> QuantizedTensor:
    """Quantize with min-max ranges widened to what neighbouring codes may add up to."""
    if isinstance(spec.granularity, PerBlock) or not (spec.symmetric and spec.qtype.signed):
        message = "neighbouring codes are limited in signed symmetric types without blocks only"
        raise ValueError(message)
    shared = isinstance(spec.granularity, PerTensor)
    axis = _output_axis(values.ndim, pairs)
    rows = np.ascontiguousarray(reduction_rows(values, axis, pairs), np.float32)
    if not np.isfinite(rows).all():
        message = "values hold NaN or infinity"
        raise ValueError(message)
    if shared:
        # The row that needs the largest scale decides for all of them.
        needed = quantize_rows(rows, pairs, spec.qtype.qmax, scale_dtype)[1].astype(np.float32)
        needed = needed[np.any(rows != 0, axis=1)]
        least = np.max(needed, initial=0.0 if least_scale is None else float(least_scale))
        least_scale = np.full(len(rows), least, np.float32)
    codes, scale = quantize_rows(rows, pairs, spec.qtype.qmax, scale_dtype, least_scale)
    restored = codes.astype(np.float32) * scale.astype(np.float32)[:, np.newaxis]
    return QuantizedTensor(
        np.ascontiguousarray(restore_rows(codes, values.shape, axis, pairs)),
        np.asarray(scale[0] if len(rows) else 1, scale_dtype) if shared else scale,
        None,
        float(np.square(restored - rows, dtype=np.float64).sum()),
        float(np.square(rows, dtype=np.float64).sum()),
    )


def _output_axis(rank: int, pairs: PairLimit) -> int:
    """Return the axis that is not summed over.

    Raises:
        ValueError: There is not one such axis.
    """
    others = set(range(rank)).difference(pairs.axes)
    if len(others) != 1:
        message = f"the axes {pairs.axes} are not all but one of a tensor of rank {rank}"
        raise ValueError(message)
    return others.pop()
