"""Resize and Upsample (ONNX operators, `Operators.md`).

Interpolation is separable: along each axis, an output element is a weighted sum of a few input
elements (`interpolation.py`). Forms that a function of PyTorch computes just so go there.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import onnx_type
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.interpolation import (
    COORDINATES,
    CROP,
    ROUNDINGS,
    TORCH_CUBIC_COEFFICIENT,
    Axis,
    Integers,
    Rules,
    nearest_samples,
    places_of,
    weighted_samples,
)
from qcompiler.execution.torch.ops.quantization import round_half_even
from qcompiler.ir.dataflow import constant_of

TABLE = OpTable()
_LINEAR: Final = {3: "linear", 4: "bilinear", 5: "trilinear"}
_CUBIC: Final = {4: "bicubic"}


@TABLE.op("Resize", since=11, host=(1, 2, 3))
def resize(
    call: Call,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Return a tensor of other sizes, sampled by nearest, linear or cubic interpolation."""
    rules = Rules(
        mode=call.text("mode", "nearest"),
        coordinates=call.text("coordinate_transformation_mode", "half_pixel"),
        rounding=call.text("nearest_mode", "round_prefer_floor"),
        cubic_coefficient=call.number("cubic_coeff_a", TORCH_CUBIC_COEFFICIENT),
        excludes_outside=bool(call.integer("exclude_outside", 0)),
        antialias=bool(call.integer("antialias", 0)),
        outside=call.number("extrapolation_value", 0.0),
    )
    places = [place % x.dim() for place in call.integers("axes", range(x.dim()))]
    if sizes is not None and sizes.numel():
        axes = _to_sizes(call, x, places, sizes.tolist())
    elif scales is not None and scales.numel():
        axes = _by_scales(call, x, places, _numbers(call, 2, scales))
    else:
        reason = "it has neither scales nor sizes"
        raise call.refuse(reason)
    if rules.coordinates == CROP:
        axes = _cropped(call, axes, [] if roi is None else _numbers(call, 1, roi))
    return _resized(call, x, axes, rules)


@TABLE.op("Resize", since=10, host=(1,))
@TABLE.op("Upsample", since=9, host=(1,))
def resize_by_scales(call: Call, x: Tensor, scales: Tensor) -> Tensor:
    """Return a tensor of other sizes, sampled at multiples of 1 / scale."""
    axes = _by_scales(call, x, range(x.dim()), _numbers(call, 1, scales))
    # The text leaves it open; ONNX Runtime and the tests of opset 10 take the next element where
    # there are less than before.
    return _resized(call, x, axes, Rules(_old_mode(call), "asymmetric", "towards_more"))


@TABLE.op("Upsample", since=7)
def upsample(call: Call, x: Tensor) -> Tensor:
    """Return a tensor of other sizes; before opset 9, scales are an attribute."""
    axes = _by_scales(call, x, range(x.dim()), call.numbers("scales"))
    return _resized(call, x, axes, Rules(_old_mode(call), "asymmetric", "towards_more"))


@TABLE.op("Upsample")
def first_upsample(call: Call, x: Tensor) -> Tensor:
    """Return an image of other sizes; before opset 7, it has two scales."""
    scales = [1.0, 1.0, call.number("height_scale"), call.number("width_scale")]
    axes = _by_scales(call, x, range(x.dim()), scales)
    return _resized(call, x, axes, Rules(_old_mode(call), "asymmetric", "towards_more"))


def _old_mode(call: Call) -> str:
    mode = call.text("mode", "nearest")
    return "linear" if mode == "bilinear" else mode


def _numbers(call: Call, position: int, given: Tensor) -> list[float]:
    """Return an input as Python numbers.

    A constant is read as it is stored: a program that computes in 16 bits has rounded `given`.
    """
    value = call.node.inputs[position]
    stored = None if value is None else constant_of(value)
    numbers: list[float] = (given if stored is None else stored.numpy()).tolist()
    return numbers


def _by_scales(call: Call, x: Tensor, places: Sequence[int], scales: Sequence[float]) -> list[Axis]:
    _check_length(call, "scales", scales, len(places))
    axes = []
    for place, scale in zip(places, scales, strict=True):
        size = x.shape[place]
        # Shape inference and ONNX Runtime multiply in float32: 10 * 0.7 is 7, not 6.9999999.
        count = math.floor(np.float32(size) * np.float32(scale))
        axes.append(Axis(place, size, count, scale))
    return axes


def _to_sizes(call: Call, x: Tensor, places: Sequence[int], sizes: Sequence[int]) -> list[Axis]:
    _check_length(call, "sizes", sizes, len(places))
    pairs = [(place, x.shape[place], wanted) for place, wanted in zip(places, sizes, strict=True)]
    policy = call.text("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return [Axis(place, size, wanted, wanted / size) for place, size, wanted in pairs]
    if policy not in ("not_larger", "not_smaller"):
        reason = f"keep_aspect_ratio_policy is {policy}"
        raise call.refuse(reason)
    ratios = [wanted / size for _, size, wanted in pairs]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    return [Axis(place, size, math.floor(scale * size + 0.5), scale) for place, size, _ in pairs]


def _cropped(call: Call, axes: Sequence[Axis], roi: Sequence[float]) -> list[Axis]:
    _check_length(call, "roi", roi, 2 * len(axes))
    bounds = zip(axes, roi[: len(axes)], roi[len(axes) :], strict=True)
    return [replace(axis, start=start, end=end) for axis, start, end in bounds]


def _check_length(call: Call, name: str, values: Sequence[float], wanted: int) -> None:
    if len(values) != wanted:
        reason = f"{name} has {len(values)} elements, and needs {wanted}"
        raise call.refuse(reason)


def _resized(call: Call, x: Tensor, axes: Sequence[Axis], rules: Rules) -> Tensor:
    _check_rules(call, rules)
    moving = [axis for axis in axes if not axis.stays]
    if any(axis.size == 0 or axis.count == 0 for axis in moving):
        return x.new_zeros(_new_shape(x, moving))
    if rules.mode == "nearest":
        return _nearest(x, moving, rules)
    own = call.input_type(0) or onnx_type(x.dtype)
    if own.is_floating_point() and _is_native(x, moving, rules):
        return _natively(x, moving, rules)
    exact = torch.float64 if not x.is_floating_point() else torch.float32
    result = x.to(torch.promote_types(x.dtype, exact))
    for axis in moving:
        result = _interpolated(result, axis, rules)
    if not own.is_floating_point():
        result = round_half_even(result).clamp(float(own.min), float(own.max))
    return result if result.requires_grad and own.is_integer() else result.to(x.dtype)


def _check_rules(call: Call, rules: Rules) -> None:
    known = {
        "mode": (rules.mode, ("nearest", "linear", "cubic")),
        "coordinate_transformation_mode": (rules.coordinates, COORDINATES),
        "nearest_mode": (rules.rounding, ROUNDINGS),
    }
    for name, (value, names) in known.items():
        if value not in names:
            reason = f"{name} is {value}"
            raise call.refuse(reason)
    if rules.mode == "nearest" and rules.antialias:
        reason = "nearest interpolation has no antialiasing"
        raise call.refuse(reason)


def _new_shape(x: Tensor, axes: Sequence[Axis]) -> list[int]:
    shape = list(x.shape)
    for axis in axes:
        shape[axis.place] = axis.count
    return shape


def _nearest(x: Tensor, axes: Sequence[Axis], rules: Rules) -> Tensor:
    samples = {axis: nearest_samples(axis, rules) for axis in axes}
    if _repeats_natively(x, samples):
        return functional.interpolate(x, _new_shape(x, axes)[2:], mode="nearest")
    for axis, indices in samples.items():
        x = x.index_select(axis.place, torch.from_numpy(indices).to(x.device))
        x = _extrapolated(x, axis, rules)
    return x


def _repeats_natively(x: Tensor, samples: dict[Axis, Integers]) -> bool:
    """Whether PyTorch finds the same elements.

    It multiplies by 1 / scale in float32, which is exact for powers of two.
    """
    if x.dim() not in _LINEAR or not x.is_floating_point() or x.itemsize == 1:
        return False
    for axis, indices in samples.items():
        times, rest = divmod(axis.count, axis.size)
        if axis.place < 2 or rest or times & (times - 1):
            return False
        if not np.array_equal(indices, np.arange(axis.count) // times):
            return False
    return bool(samples)


def _is_native(x: Tensor, axes: Sequence[Axis], rules: Rules) -> bool:
    """Whether PyTorch's linear or bicubic interpolation is the one that is asked for."""
    kinds = _LINEAR if rules.mode == "linear" else _CUBIC
    if x.dim() not in kinds or rules.antialias or rules.excludes_outside:
        return False
    if rules.mode == "cubic" and rules.cubic_coefficient != TORCH_CUBIC_COEFFICIENT:
        return False
    if rules.coordinates == "pytorch_half_pixel" and any(axis.count == 1 for axis in axes):
        return False
    aligned = rules.coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners")
    return aligned and all(axis.place > 1 and axis.is_exact for axis in axes)


def _natively(x: Tensor, axes: Sequence[Axis], rules: Rules) -> Tensor:
    kinds = _LINEAR if rules.mode == "linear" else _CUBIC
    sizes = _new_shape(x, axes)[2:]
    aligned = rules.coordinates == "align_corners"
    return functional.interpolate(x, sizes, mode=kinds[x.dim()], align_corners=aligned)


def _interpolated(x: Tensor, axis: Axis, rules: Rules) -> Tensor:
    """Return a tensor with one axis resized."""
    indices, weights = weighted_samples(axis, rules)
    places = torch.from_numpy(indices).to(x.device)
    factors = torch.from_numpy(weights).to(x)
    shape = [-1 if place == axis.place else 1 for place in range(x.dim())]
    parts = [
        x.index_select(axis.place, places[tap]) * factors[tap].reshape(shape)
        for tap in range(len(indices))
    ]
    return _extrapolated(torch.stack(parts).sum(0), axis, rules)


def _extrapolated(x: Tensor, axis: Axis, rules: Rules) -> Tensor:
    """Return a tensor with a fixed value where an axis was sampled outside of itself."""
    if rules.coordinates != CROP:
        return x
    places = places_of(axis, rules)
    outside = torch.from_numpy((places < 0) | (places > axis.size - 1)).to(x.device)
    shape = [-1 if place == axis.place else 1 for place in range(x.dim())]
    return x.masked_fill(outside.reshape(shape), rules.outside)
