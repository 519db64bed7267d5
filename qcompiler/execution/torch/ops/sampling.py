"""Sampling of images at computed places (ONNX operators, `Operators.md`)."""

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()
_MODES: Final = {
    "linear": "bilinear",
    "bilinear": "bilinear",
    "cubic": "bicubic",
    "bicubic": "bicubic",
    "nearest": "nearest",
}
_PADDINGS: Final = ("zeros", "border", "reflection")
_IMAGE: Final = 4
"""Rank of a batch of two-dimensional images."""
_CENTER_ALIGNED: Final = 16
"""Opset from which RoiAlign has half-pixel coordinates, unless it says otherwise."""


@TABLE.op("GridSample", since=16)
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    """Return images [N, C, D1, ...] sampled at `grid`, [N, ..., axes], of (x, y, z) in -1 to 1.

    Cubic sampling with border padding replaces neighbours outside of the image, not the place
    itself: so do PyTorch and ONNX Runtime, though not the standard's reference evaluator.
    """
    mode = _MODES.get(call.text("mode", "linear"))
    padding = call.text("padding_mode", "zeros")
    if mode is None or padding not in _PADDINGS:
        reason = f"mode is {call.text('mode', 'linear')}, padding_mode is {padding}"
        raise call.refuse(reason)
    rank, aligned = x.dim(), bool(call.integer("align_corners", 0))
    if rank not in (_IMAGE - 1, _IMAGE, _IMAGE + 1) or (rank > _IMAGE and mode == "bicubic"):
        reason = f"{mode} sampling of {rank - 2} spatial axes is not supported"
        raise call.refuse(reason)
    # Places between pixels need more digits than 16 bits have.
    exact = torch.promote_types(x.dtype, torch.float32)
    images, places = x.to(exact), grid.to(exact)
    if rank == _IMAGE - 1:
        # An image of one row, sampled on that row.
        images, places = images.unsqueeze(2), functional.pad(places, (0, 1)).unsqueeze(1)
    result = functional.grid_sample(images, places, mode, padding, aligned).to(x.dtype)
    return result.squeeze(2) if rank == _IMAGE - 1 else result


@TABLE.op("AffineGrid", since=20, host=(1,))
def affine_grid(call: Call, theta: Tensor, size: Tensor) -> Tensor:
    """Return the places [N, ..., axes] that affine maps [N, axes, axes + 1] send an image to.

    With aligned corners, an axis of one element is sampled in its middle; the standard divides
    zero by zero there.
    """
    return functional.affine_grid(theta, size.tolist(), bool(call.integer("align_corners", 0)))


@TABLE.op("RoiAlign", since=10)
def roi_align(call: Call, x: Tensor, rois: Tensor, images: Tensor) -> Tensor:
    """Return [R, C, height, width]: regions of [N, C, H, W], each bin sampled and pooled.

    Regions are [R, 4] of (x1, y1, x2, y2), each on the image that `images` names. The maximum is
    that of the weighted corners of all samples, as the standard's tests have it.
    """
    mode = call.text("mode", "avg").lower()
    if mode not in ("avg", "max"):
        reason = f"mode is {mode}"
        raise call.refuse(reason)
    default = "half_pixel" if call.version >= _CENTER_ALIGNED else "output_half_pixel"
    coordinates = call.text("coordinate_transformation_mode", default).lower()
    if coordinates not in ("half_pixel", "output_half_pixel"):
        reason = f"coordinate_transformation_mode is {coordinates}"
        raise call.refuse(reason)
    exact = torch.promote_types(x.dtype, torch.float32)
    corners = rois.to(exact) * call.number("spatial_scale", 1.0)
    corners = corners - 0.5 if coordinates == "half_pixel" else corners
    lengths = corners[:, 2:] - corners[:, :2]
    if coordinates != "half_pixel":
        lengths = lengths.clamp(min=1)
    pooled = (call.integer("output_height", 1), call.integer("output_width", 1))
    rows, columns = (
        _Samples(call, x.shape[2 + axis], pooled[axis], corners[:, 1 - axis], lengths[:, 1 - axis])
        for axis in (0, 1)
    )
    return _pooled_samples(x, images, rows, columns, mode).to(x.dtype)


@TABLE.op("MaxRoiPool")
def max_roi_pool(call: Call, x: Tensor, rois: Tensor) -> Tensor:
    """Return [R, C, height, width]: the maximum of every bin of regions, zero for empty bins.

    Regions are [R, 5] of (image, x1, y1, x2, y2), both ends included.
    """
    pooled = call.integers("pooled_shape")
    corners = rois[:, 1:] * call.number("spatial_scale", 1.0)
    # Half away from zero.
    ends = corners.sign() * (corners.abs() + 0.5).floor()
    regions = x[rois[:, 0].long()]
    rows = _bins(ends[:, 1], ends[:, 3], pooled[0], x.shape[2])
    columns = _bins(ends[:, 0], ends[:, 2], pooled[1], x.shape[3])
    # [R, C, pooled height, W], then [R, C, pooled height, pooled width].
    low = -math.inf
    bands = [regions.masked_fill(~rows[:, None, i, :, None], low).amax(2) for i in range(pooled[0])]
    band = torch.stack(bands, 2)
    cells = [band.masked_fill(~columns[:, None, None, j], low).amax(3) for j in range(pooled[1])]
    result = torch.stack(cells, 3)
    return result.masked_fill(result == low, 0)


class _Samples:
    """Where the samples of every region lie along one axis: tensors of [R, pooled * samples].

    Attributes:
        low: The pixel before each sample.
        high: The pixel after it.
        fraction: How far it lies from the one to the other.
        inside: Whether it lies on the image, or within a pixel of it.
        used: Whether it is one of the region's samples: some have fewer than others.
        counts: Samples per bin of every region, [R].
        pooled: Bins.
    """

    def __init__(self, call: Call, size: int, pooled: int, starts: Tensor, lengths: Tensor) -> None:
        ratio = call.integer("sampling_ratio", 0)
        steps = (lengths / pooled).detach().ceil().clamp(min=0)
        steps = torch.full_like(steps, ratio) if ratio > 0 else steps
        # How many there are decides shapes, so the host has to know: the one place that waits.
        most = ratio if ratio > 0 else max(1, int(steps.max())) if len(steps) else 1
        sample = torch.arange(most, device=starts.device)
        bins = torch.arange(pooled, device=starts.device)
        widths = (lengths / pooled)[:, None, None]
        shares = (sample + 0.5) / steps.clamp(min=1)[:, None, None]
        places = (starts[:, None, None] + (bins[:, None] + shares) * widths).flatten(1)
        self.inside = (places >= -1) & (places <= size)
        places = places.clamp(0, size - 1)
        self.low = places.detach().floor().long()
        self.high = (self.low + 1).clamp(max=size - 1)
        self.fraction = places - self.low
        self.used = (sample < steps[:, None]).repeat(1, pooled)
        self.counts = steps
        self.pooled = pooled


def _pooled_samples(
    x: Tensor, images: Tensor, rows: _Samples, columns: _Samples, mode: str
) -> Tensor:
    """Return what the bins of every region hold: [R, C, rows, columns]."""
    channels, height, width = x.shape[1:]
    pixels = x.transpose(0, 1).reshape(channels, -1)
    first = images.long()[:, None, None] * (height * width)
    inside = rows.inside[:, :, None] & columns.inside[:, None, :]
    corners = []
    for row, down in ((rows.low, 1 - rows.fraction), (rows.high, rows.fraction)):
        for column, right in (
            (columns.low, 1 - columns.fraction),
            (columns.high, columns.fraction),
        ):
            places = first + row[:, :, None] * width + column[:, None, :]
            weights = down[:, :, None] * right[:, None, :] * inside
            values = pixels.index_select(1, places.reshape(-1)).reshape(channels, *places.shape)
            corners.append(values * weights)
    used = rows.used[:, :, None] & columns.used[:, None, :]
    bins = (rows.pooled, columns.pooled)
    if mode == "max":
        values = torch.stack(corners).amax(0).masked_fill(~used, -math.inf)
        result = _by_bin(values, bins).amax((3, 5))
        result = result.masked_fill(result == -math.inf, 0)
    else:
        total = _by_bin(torch.stack(corners).sum(0) * used, bins).sum((3, 5))
        result = total / (rows.counts * columns.counts).clamp(min=1)[:, None, None]
    return result.transpose(0, 1)


def _by_bin(values: Tensor, bins: tuple[int, int]) -> Tensor:
    """Return [C, R, bins, samples, bins, samples] of [C, R, rows, columns]."""
    channels, regions, rows, columns = values.shape
    high, wide = bins
    return values.reshape(channels, regions, high, rows // high, wide, columns // wide)


def _bins(start: Tensor, end: Tensor, pooled: int, size: int) -> Tensor:
    """Return which pixels along an axis every bin of every region holds, [R, pooled, size]."""
    length = (end - start + 1).clamp(min=1)[:, None]
    bins = torch.arange(pooled, device=start.device)
    first = (bins * length / pooled).floor() + start[:, None]
    beyond = ((bins + 1) * length / pooled).ceil() + start[:, None]
    pixels = torch.arange(size, device=start.device)
    return (pixels >= first[..., None]) & (pixels < beyond[..., None])
