"""Convolutions of every kind (ONNX operators, `Operators.md`).

Images are [N, C, D1, ...] with one to three spatial axes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.quantization import round_half_even
from qcompiler.execution.torch.ops.windows import (
    BATCH_AND_CHANNELS,
    SAME,
    Windows,
    pads_of,
    per_axis,
    split_padding,
    windows_of,
)

TABLE = OpTable()
_CONV: Final[Mapping[int, Callable[..., Tensor]]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_TRANSPOSED: Final[Mapping[int, Callable[..., Tensor]]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


@TABLE.op("Conv")
def conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the cross-correlation of images [N, C, ...] with kernels [M, C / group, ...]."""
    function = _by_rank(call, _CONV, x)
    windows = windows_of(call, x, _kernel(call, weight))
    pads = windows.begin
    if not windows.is_native:
        x, pads = _pad(x, windows), (0,) * len(pads)
    group = call.integer("group", 1)
    return function(x, weight, bias, windows.strides, pads, windows.dilations, group)


@TABLE.op("ConvTranspose")
def conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the transposed convolution of [N, C, ...] with kernels [C, M / group, ...]."""
    function = _by_rank(call, _TRANSPOSED, x)
    rank = x.dim() - BATCH_AND_CHANNELS
    strides = per_axis(call, "strides", rank)
    dilations = per_axis(call, "dilations", rank)
    more = per_axis(call, "output_padding", rank, 0)
    spans = zip(_kernel(call, weight), dilations, strict=True)
    full = [
        stride * (size - 1) + (length - 1) * dilation + 1
        for stride, size, (length, dilation) in zip(strides, x.shape[2:], spans, strict=True)
    ]
    begin, end = _cut(call, x, strides, [a + b for a, b in zip(full, more, strict=True)])
    group = call.integer("group", 1)
    if begin == end and all(0 <= a < b for a, b in zip(more, strides, strict=True)):
        return function(x, weight, bias, strides, begin, more, group, dilations)
    if bias is not None:
        bias = bias.reshape(-1, *[1] * rank)
    result = function(x, weight, None, strides, 0, 0, group, dilations)
    # What lies beyond every window is zero before the bias is added.
    amounts = [
        amount
        for axis in reversed(range(rank))
        for amount in (-begin[axis], more[axis] - end[axis])
    ]
    result = functional.pad(result, amounts)
    return result if bias is None else result + bias


@TABLE.op("ConvInteger", since=10)
def conv_integer(
    call: Call,
    x: Tensor,
    weight: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
) -> Tensor:
    """Return the int32 convolution of codes less their zero points (the weight's per channel)."""
    result = _convolve_steps(call, x, weight, x_zero, w_zero)
    if result.requires_grad:
        return result
    return result.to(torch.int64).to(call.elements.of(ir.DataType.INT32))


@TABLE.op("QLinearConv", since=10)
def qlinear_conv(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the codes of a convolution of codes; gradients pass straight through the rounding."""
    rank = x.dim() - BATCH_AND_CHANNELS
    total = _convolve_steps(call, x, weight, x_zero, w_zero)
    if bias is not None:
        total = total + bias.to(total.dtype).reshape(-1, *[1] * rank)
    # ONNX Runtime multiplies by one float32 factor per channel.
    factor = x_scale * w_scale / y_scale
    if factor.numel() > 1:
        factor = factor.reshape(-1, *[1] * rank)
    codes = round_half_even(total.to(factor.dtype) * factor) + y_zero.to(factor.dtype)
    kind = call.input_type(7)
    is_signed = y_zero.dtype == torch.int8 if kind is None else kind is ir.DataType.INT8
    codes = codes.clamp(-128, 127) if is_signed else codes.clamp(0, 255)
    if codes.requires_grad:
        return codes
    return codes.to(torch.int8 if is_signed else torch.uint8)


@TABLE.op("Col2Im", since=18, host=(1, 2))
def col2im(call: Call, x: Tensor, image_shape: Tensor, block_shape: Tensor) -> Tensor:
    """Return images [N, C, *image_shape] of columns [N, C * block, L], added up."""
    sizes, kernel = image_shape.tolist(), block_shape.tolist()
    rank = len(sizes)
    begin, end = pads_of(call, rank)
    strides, dilations = per_axis(call, "strides", rank), per_axis(call, "dilations", rank)
    windows = Windows(tuple(kernel), strides, dilations, begin, end)
    counts = windows.counts(sizes)
    padded = [sum(each) for each in zip(sizes, begin, end, strict=True)]
    # Numbers the elements of the padded image, and looks up which ones each window holds.
    numbers = torch.arange(math.prod(padded), device=x.device).reshape(1, 1, *padded)
    places = windows.view(numbers, counts).flatten(2, 1 + rank).flatten(3)[0, 0].T
    samples, block = x.shape[0], math.prod(kernel)
    columns = x.reshape(samples, x.shape[1] // block, -1)
    image = x.new_zeros(*columns.shape[:2], math.prod(padded))
    image = image.index_add(2, places.reshape(-1), columns).reshape(*columns.shape[:2], *padded)
    for axis, (first, size) in enumerate(zip(begin, sizes, strict=True)):
        image = image.narrow(BATCH_AND_CHANNELS + axis, first, size)
    return image


@TABLE.op("DeformConv", since=19)
def deform_conv(
    call: Call,
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return a convolution whose windows sample [N, C, H, W] at learned offsets, bilinearly.

    Offsets are [N, offset_group * kH * kW * 2, oH, oW], of (y, x); the mask has no factor of 2.
    """
    if x.dim() != 4:
        reason = f"{x.dim() - BATCH_AND_CHANNELS} spatial axes are not supported"
        raise call.refuse(reason)
    windows = windows_of(call, x, _kernel(call, weight))
    samples, channels, _, _ = x.shape
    rows, columns = offset.shape[2:]
    parts, taps = call.integer("offset_group", 1), math.prod(windows.kernel)
    # Places are scaled to -1..1 and back; in float32, those on a pixel would come back beside it.
    shifts = offset.reshape(samples * parts, taps, 2, rows, columns).double()
    grid = _sampling_grid(x, windows, shifts)
    images = x.reshape(samples * parts, channels // parts, *x.shape[2:]).double()
    sampled = functional.grid_sample(
        images, grid.flatten(1, 2), padding_mode="zeros", align_corners=False
    )
    sampled = sampled.to(x.dtype).reshape(samples * parts, -1, taps, rows * columns)
    if mask is not None:
        sampled = sampled * mask.reshape(samples * parts, 1, taps, rows * columns)
    group = call.integer("group", 1)
    patches = sampled.reshape(samples, group, -1, rows * columns)
    kernels = weight.reshape(group, weight.shape[0] // group, -1)
    result = (kernels @ patches).reshape(samples, -1, rows, columns)
    return result if bias is None else result + bias.reshape(-1, 1, 1)


@TABLE.op("CausalConvWithState", since=27)
def causal_conv_with_state(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a depthwise convolution [B, C, L] that looks only back, and its last k - 1 inputs."""
    before = weight.shape[2] - 1
    padded = functional.pad(x, (before, 0)) if past is None else torch.cat([past.to(x.dtype), x], 2)
    result = functional.conv1d(padded, weight, bias, groups=x.shape[1])
    activation = call.text("activation", "none")
    if activation in ("silu", "swish"):
        result = functional.silu(result)
    elif activation != "none":
        reason = f"activation is {activation}"
        raise call.refuse(reason)
    return result, padded.narrow(2, padded.shape[2] - before, before)


def _by_rank(
    call: Call, functions: Mapping[int, Callable[..., Tensor]], x: Tensor
) -> Callable[..., Tensor]:
    rank = x.dim() - BATCH_AND_CHANNELS
    if rank not in functions:
        reason = f"{rank} spatial axes are not supported"
        raise call.refuse(reason)
    return functions[rank]


def _kernel(call: Call, weight: Tensor) -> list[int]:
    kernel = list(weight.shape[2:])
    if call.integers("kernel_shape", kernel) != kernel:
        reason = f"kernel_shape says {call.integers('kernel_shape')}, the weight has {kernel}"
        raise call.refuse(reason)
    return kernel


def _pad(x: Tensor, windows: Windows) -> Tensor:
    pairs = zip(reversed(windows.begin), reversed(windows.end), strict=True)
    return functional.pad(x, [amount for pair in pairs for amount in pair])


def _cut(
    call: Call, x: Tensor, strides: tuple[int, ...], full: list[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what to cut off a transposed convolution before and after every axis.

    Negative: it is too small for the output that is asked for, and gets zeros at the end.
    """
    rank, mode = len(full), call.text("auto_pad", "NOTSET")
    if mode not in ("NOTSET", "", "VALID", *SAME):
        reason = f"auto_pad is {mode}"
        raise call.refuse(reason)
    if call.has("output_shape"):
        # Some exporters count the batch and the channels as well.
        wanted = call.integers("output_shape")[-rank:]
    elif mode in SAME:
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    else:
        return ((0,) * rank,) * 2 if mode == "VALID" else pads_of(call, rank)
    totals = [a - b for a, b in zip(full, wanted, strict=True)]
    begin, end = split_padding([max(0, t) for t in totals], more_at_end=mode == "SAME_UPPER")
    return begin, tuple(
        min(each, total) if total < 0 else each for each, total in zip(end, totals, strict=True)
    )


def _convolve_steps(
    call: Call, x: Tensor, weight: Tensor, x_zero: Tensor | None, w_zero: Tensor | None
) -> Tensor:
    """Return the convolution of codes less their zero points, exact.

    PyTorch has integer convolutions on no GPU; float64 holds sums up to 2**53.
    """
    steps, kernels = x.double(), weight.double()
    if x_zero is not None:
        steps = steps - x_zero.double()
    if w_zero is not None:
        # One for all, or one per output channel.
        kernels = kernels - w_zero.double().reshape(-1, *[1] * (weight.dim() - 1))
    total: Tensor = conv(call, steps, kernels)
    return total


def _sampling_grid(x: Tensor, windows: Windows, shifts: Tensor) -> Tensor:
    """Return where `grid_sample` has to look, [N * parts, taps, oH, oW, 2] of (x, y)."""
    axes: list[Any] = []
    taps = torch.meshgrid(
        *[
            torch.arange(n, device=x.device) * d
            for n, d in zip(windows.kernel, windows.dilations, strict=True)
        ],
        indexing="ij",
    )
    for axis, tap in enumerate(taps):
        count = shifts.shape[3 + axis]
        starts = torch.arange(count, device=x.device) * windows.strides[axis] - windows.begin[axis]
        starts = starts.reshape([-1 if axis == each else 1 for each in range(2)])
        places = tap.reshape(-1, 1, 1) + starts + shifts[:, :, axis]
        # -1 and 1 are the outer borders of the first and the last pixel.
        axes.append((2 * places + 1) / x.shape[BATCH_AND_CHANNELS + axis] - 1)
    return torch.stack(axes[::-1], dim=-1)
