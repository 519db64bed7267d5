"""Conversion to floats of 8 and 4 bits (ONNX operators, `Cast`; OCP Microscaling Formats 1.0).

PyTorch's own conversions saturate or not as each type and device does. Here values are rounded to
the type's grid first, so that the conversion that follows is exact everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SmallFloat:
    """What values a float type can take.

    Attributes:
        mantissa: Bits after the leading one.
        lowest_exponent: Power of two of the smallest normal value.
        largest: Largest finite value.
        overflow: Where larger values go when they do not saturate: infinity, NaN, or None for a
            type that has neither and always saturates.
    """

    mantissa: int
    lowest_exponent: int
    largest: float
    overflow: float | None


SMALL_FLOATS: Final[Mapping[ir.DataType, SmallFloat]] = {
    ir.DataType.FLOAT8E4M3FN: SmallFloat(3, -6, 448.0, torch.nan),
    ir.DataType.FLOAT8E4M3FNUZ: SmallFloat(3, -7, 240.0, torch.nan),
    ir.DataType.FLOAT8E5M2: SmallFloat(2, -14, 57344.0, torch.inf),
    ir.DataType.FLOAT8E5M2FNUZ: SmallFloat(2, -15, 57344.0, torch.nan),
    ir.DataType.FLOAT4E2M1: SmallFloat(1, 0, 6.0, None),
}
"""Every float type below 16 bits but FLOAT8E8M0, which holds powers of two only."""

_E8M0_BIAS: Final = 127
_E8M0_NAN: Final = 255


class _RoundToGrid(torch.autograd.Function):
    """Rounding to a type's mantissa width whose gradient is that of the identity."""

    @staticmethod
    def forward(_context: Any, values: Tensor, form: SmallFloat) -> Tensor:
        exponent = torch.frexp(values).exponent - 1
        step = exponent.clamp(min=form.lowest_exponent) - form.mantissa
        scale = torch.ldexp(torch.ones_like(values), step)
        return (values / scale).round() * scale

    @staticmethod
    def backward(_context: Any, *gradients: Any) -> Any:
        return gradients[0], None


def to_small_float(
    values: Tensor, target: ir.DataType, stored: torch.dtype, *, saturate: bool = True
) -> Tensor:
    """Return values rounded, half to even, to a float type of 8 or 4 bits.

    The gradient passes straight through the rounding and stops where values saturate.

    Args:
        values: Of any type.
        target: One of `SMALL_FLOATS`.
        stored: PyTorch type that its elements are kept in.
        saturate: Whether values beyond the largest finite one become that one; types that have
            neither infinity nor NaN always do so.

    Returns:
        Tensor of type `stored`; where a gradient is wanted, a float tensor of the same values,
        because PyTorch has no arithmetic on 8-bit floats.
    """
    form = SMALL_FLOATS[target]
    rounded: Tensor = _RoundToGrid.apply(  # type: ignore[no-untyped-call]
        as_computable(values), form
    )
    if form.overflow is None:
        # No NaN either: ml_dtypes makes it a negative zero.
        bounded = rounded.clamp(-form.largest, form.largest)
        result = torch.where(bounded.isnan(), -0.0, bounded)
    elif saturate:
        result = rounded.clamp(-form.largest, form.largest)
    else:
        overflow = torch.full_like(rounded, form.overflow).copysign(rounded.detach())
        result = torch.where(rounded.abs() > form.largest, overflow, rounded)
    return result if torch.is_grad_enabled() and result.requires_grad else result.to(stored)


def to_e8m0(values: Tensor, round_mode: str, *, saturate: bool) -> Tensor:
    """Return the powers of two that magnitudes are rounded to, as float8_e8m0fnu.

    Args:
        values: Of any type; the sign is ignored (ONNX leaves negative values undefined).
        round_mode: "up", "down", or "nearest", where ties go up.
        saturate: Whether values out of range become the smallest or largest power, not NaN.
    """
    mantissa, exponent = torch.frexp(as_computable(values).abs())
    # frexp has its mantissa in [0.5, 1).
    above = {"up": mantissa > 0.5, "nearest": mantissa >= 0.75, "down": mantissa >= 1.0}
    code = exponent - 1 + above[round_mode] + _E8M0_BIAS
    code = torch.where(mantissa == 0, -1, code)
    code = torch.where(mantissa == torch.inf, _E8M0_NAN, code)
    if saturate:
        code = code.clamp(0, _E8M0_NAN - 1)
    is_number = (code >= 0) & (code < _E8M0_NAN) & ~mantissa.isnan()
    code = torch.where(is_number, code, _E8M0_NAN)
    return code.to(torch.uint8).view(torch.float8_e8m0fnu)


def as_computable(values: Tensor) -> Tensor:
    """Return values as float32, or float64 if they are of that type."""
    return values if values.dtype is torch.float64 else values.to(torch.float32)
