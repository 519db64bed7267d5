"""Pools (ONNX operators, `Operators.md`).

Images are [N, C, D1, ...]. The usual forms are one PyTorch function each; what those cannot do,
such as padding one side only, is reduced over a view of the windows.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.windows import (
    BATCH_AND_CHANNELS,
    SAME,
    Windows,
    pads_of,
    per_axis,
    plane_offsets,
    windows_of,
)

TABLE = OpTable()
_MAX: Final[Mapping[int, Callable[..., Tensor]]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVERAGE: Final[Mapping[int, Callable[..., Tensor]]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}
_INDEXED: Final[Mapping[int, Callable[..., tuple[Tensor, Tensor]]]] = {
    1: functional.max_pool1d_with_indices,
    2: functional.max_pool2d_with_indices,
    3: functional.max_pool3d_with_indices,
}


@TABLE.op("MaxPool")
def max_pool(call: Call, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Return the maximum of every window, and its place in the flattened image where wanted.

    Integer codes stay integers.
    """
    windows = _windows(call, x)
    rank = len(windows.kernel)
    if rank not in _MAX:
        reason = f"{rank} spatial axes are not supported"
        raise call.refuse(reason)
    ceil = bool(call.integer("ceil_mode", 0))
    image, pads = _on_device(x), windows.begin
    if rank == 1 and not image.is_floating_point():
        image = image.float()  # exact for 8 bits, for which this one has no kernel
    sizes = image.shape[BATCH_AND_CHANNELS:]
    if not _fits(windows):
        image = windows.padded(image, windows.counts(sizes, ceil=ceil), _lowest(image))
        pads, ceil = (0,) * rank, False
    settings = (windows.kernel, windows.strides, pads, windows.dilations, ceil)
    if not call.wants(1):
        return _MAX[rank](image, *settings).to(x.dtype)
    values, places = _INDEXED[rank](image, *settings)
    if image.shape[BATCH_AND_CHANNELS:] != sizes or call.integer("storage_order", 0):
        places = _renumbered(call, places, image.shape[BATCH_AND_CHANNELS:], sizes, windows)
    return values.to(x.dtype), places + plane_offsets(x, math.prod(sizes))


@TABLE.op("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    """Return the mean of every window, with or without the padding in it."""
    windows = _windows(call, x)
    ceil = bool(call.integer("ceil_mode", 0))
    counts_padding = bool(call.integer("count_include_pad", 0))
    rank = len(windows.kernel)
    # On the CPU, the three-dimensional function lacks the types of 16 bits.
    lacks = rank == max(_AVERAGE) and x.itemsize < torch.float32.itemsize
    if rank in _AVERAGE and not lacks and _fits(windows) and set(windows.dilations) == {1}:
        function = _AVERAGE[rank]
        return function(x, windows.kernel, windows.strides, windows.begin, ceil, counts_padding)
    counts = windows.counts(x.shape[BATCH_AND_CHANNELS:], ceil=ceil)
    total = windows.view(windows.padded(x, counts), counts).sum(windows.kernel_axes)
    ones = x.new_ones(1, 1, *x.shape[BATCH_AND_CHANNELS:])
    if counts_padding:
        # What a last window needs beyond the padding never counts.
        ones = windows.padded(ones, [0] * rank, 1.0)
        inside = Windows(
            windows.kernel, windows.strides, windows.dilations, (0,) * rank, (0,) * rank
        )
        elements = inside.view(inside.padded(ones, counts), counts)
    else:
        elements = windows.view(windows.padded(ones, counts), counts)
    return total / elements.sum(windows.kernel_axes)


@TABLE.op("LpPool")
def lp_pool(call: Call, x: Tensor) -> Tensor:
    """Return the p-norm of every window."""
    windows = _windows(call, x)
    ceil = bool(call.integer("ceil_mode", 0))
    counts = windows.counts(x.shape[BATCH_AND_CHANNELS:], ceil=ceil)
    elements = windows.view(windows.padded(x, counts), counts)
    # The attribute was a float at first.
    norm: Tensor = torch.linalg.vector_norm(elements, call.number("p", 2), windows.kernel_axes)
    return norm


@TABLE.op("GlobalAveragePool")
def global_average_pool(_call: Call, x: Tensor) -> Tensor:
    """Return the mean of every channel, [N, C, 1, ...]."""
    return x.mean(_spatial(x), keepdim=True)


@TABLE.op("GlobalMaxPool")
def global_max_pool(_call: Call, x: Tensor) -> Tensor:
    """Return the maximum of every channel, [N, C, 1, ...]."""
    return x.amax(_spatial(x), keepdim=True)


@TABLE.op("GlobalLpPool")
def global_lp_pool(call: Call, x: Tensor) -> Tensor:
    """Return the p-norm of every channel, [N, C, 1, ...]."""
    norm: Tensor = torch.linalg.vector_norm(x, call.number("p", 2), _spatial(x), keepdim=True)
    return norm


@TABLE.op("MaxUnpool", since=9, host=(2,))
def max_unpool(call: Call, x: Tensor, places: Tensor, output_shape: Tensor | None = None) -> Tensor:
    """Return an image that is zero but for the values at their places.

    Places count in the image that the attributes imply; a larger `output_shape` adds zeros at
    the ends.
    """
    rank = x.dim() - BATCH_AND_CHANNELS
    strides = per_axis(call, "strides", rank)
    begin, end = pads_of(call, rank)
    kernel = call.integers("kernel_shape")
    sizes = [
        (size - 1) * strides[axis] - begin[axis] - end[axis] + kernel[axis]
        for axis, size in enumerate(x.shape[BATCH_AND_CHANNELS:])
    ]
    shape = [*x.shape[:BATCH_AND_CHANNELS], *sizes]
    image = x.new_zeros(math.prod(shape)).scatter(0, places.reshape(-1), x.reshape(-1))
    image = image.reshape(shape)
    if output_shape is None:
        return image
    wanted = output_shape.tolist()
    if len(wanted) != len(shape) or any(a < b for a, b in zip(wanted, shape, strict=True)):
        reason = f"output_shape is {wanted}, smaller than {shape}"
        raise call.refuse(reason)
    amounts = [
        amount
        for a, b in zip(reversed(wanted), reversed(shape), strict=True)
        for amount in (0, a - b)
    ]
    return functional.pad(image, amounts)


def _windows(call: Call, x: Tensor) -> Windows:
    windows = windows_of(call, x, call.integers("kernel_shape"))
    rest = [
        (size - 1) % stride + 1 - extent
        for size, stride, extent in zip(
            x.shape[BATCH_AND_CHANNELS:], windows.strides, windows.extents, strict=True
        )
    ]
    if call.text("auto_pad", "NOTSET") in SAME and max(rest) > 1:
        reason = "auto_pad asks for negative padding, which some take for none and others for a cut"
        raise call.refuse(reason)
    return windows


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(BATCH_AND_CHANNELS, x.dim()))


def _fits(windows: Windows) -> bool:
    """Whether PyTorch's pools take this padding: no more than half a kernel."""
    pairs = zip(windows.begin, windows.kernel, strict=True)
    return windows.is_native and all(2 * pad <= size for pad, size in pairs)


def _on_device(x: Tensor) -> Tensor:
    """Return codes so that a GPU can pool them; float32 holds 8 bits exactly."""
    return x.float() if x.is_cuda and not x.is_floating_point() else x


def _lowest(x: Tensor) -> float:
    return -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min


def _renumbered(
    call: Call, places: Tensor, padded: torch.Size, sizes: torch.Size, windows: Windows
) -> Tensor:
    """Return places in a padded plane as places in the plane itself, in the wanted order."""
    is_padded = padded != sizes
    axes = []
    for axis in reversed(range(len(sizes))):
        along = places % padded[axis]
        places = places // padded[axis]
        if is_padded:
            # A window that lies in the padding altogether has no place: any will do.
            along = (along - windows.begin[axis]).clamp(0, sizes[axis] - 1)
        axes.append((along, sizes[axis]))
    if call.integer("storage_order", 0) == 0:
        axes.reverse()
    # The axis that comes last now is the one whose elements are neighbours.
    flat = torch.zeros_like(places)
    for along, size in axes:
        flat = flat * size + along
    return flat
