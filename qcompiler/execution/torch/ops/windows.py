"""Windows of convolutions and pools over an image (ONNX operators, `Operators.md`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call

SAME: Final = ("SAME_UPPER", "SAME_LOWER")
BATCH_AND_CHANNELS: Final = 2
"""Axes before the spatial ones."""


@dataclass(frozen=True, slots=True)
class Windows:
    """One window per output element; every field has one entry per spatial axis.

    Attributes:
        kernel: Elements of a window.
        strides: From one window to the next.
        dilations: From one element of a window to the next.
        begin: Padding before the image.
        end: Padding after it.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def extents(self) -> tuple[int, ...]:
        """How much of the padded image a window spans."""
        pairs = zip(self.kernel, self.dilations, strict=True)
        return tuple((size - 1) * dilation + 1 for size, dilation in pairs)

    @property
    def is_native(self) -> bool:
        """Whether PyTorch's own functions take this padding: as much before as after."""
        return self.begin == self.end and min(self.begin, default=0) >= 0

    def counts(self, sizes: Sequence[int], *, ceil: bool = False) -> list[int]:
        """Return how many windows there are along each axis.

        Args:
            sizes: Of the image without padding.
            ceil: Whether a last window may reach beyond the padding, as long as it does not
                start there.
        """
        counts = []
        for axis, (size, extent) in enumerate(zip(sizes, self.extents, strict=True)):
            stride, begin, end = self.strides[axis], self.begin[axis], self.end[axis]
            room = size + begin + end - extent
            count = (-(-room // stride) if ceil else room // stride) + 1
            if ceil and (count - 1) * stride >= size + begin:
                count -= 1
            counts.append(max(0, count))
        return counts

    def padded(self, x: Tensor, counts: Sequence[int], value: float = 0.0) -> Tensor:
        """Return an image with its padding, and whatever else the last window needs."""
        amounts: list[int] = []
        for axis in reversed(range(len(counts))):
            size, stride = x.shape[BATCH_AND_CHANNELS + axis], self.strides[axis]
            begin, end = self.begin[axis], self.end[axis]
            needed = (counts[axis] - 1) * stride + self.extents[axis]
            amounts += [begin, max(end, needed - size - begin)]
        return functional.pad(x, amounts, value=value) if any(amounts) else x

    def view(self, padded: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the elements of every window, [N, C, *counts, *kernel], without copying."""
        for axis, count in enumerate(counts):
            place = BATCH_AND_CHANNELS + axis
            padded = padded.unfold(place, self.extents[axis], self.strides[axis])
            padded = padded.narrow(place, 0, count)[..., :: self.dilations[axis]]
        return padded

    @property
    def kernel_axes(self) -> tuple[int, ...]:
        """The axes of `view` that run over a window."""
        return tuple(range(-len(self.kernel), 0))


def windows_of(call: Call, x: Tensor, kernel: Sequence[int]) -> Windows:
    """Return the windows that a node's attributes describe.

    Args:
        call: The node: auto_pad, pads, strides, dilations.
        x: Image, [N, C, D1, ...].
        kernel: Sizes of a window.

    Raises:
        ModelError: Attributes that do not fit the image.
    """
    sizes = x.shape[BATCH_AND_CHANNELS:]
    rank = len(sizes)
    strides = per_axis(call, "strides", rank)
    dilations = per_axis(call, "dilations", rank)
    if len(kernel) != rank:
        reason = f"a kernel of {len(kernel)} axes over an image of {rank}"
        raise call.refuse(reason)
    mode = call.text("auto_pad", "NOTSET")
    begin = end = (0,) * rank
    if mode in ("NOTSET", ""):
        begin, end = pads_of(call, rank)
    elif mode in SAME:
        rooms = zip(sizes, strides, kernel, dilations, strict=True)
        totals = [
            (-(-size // stride) - 1) * stride + (length - 1) * dilation + 1 - size
            for size, stride, length, dilation in rooms
        ]
        begin, end = split_padding(
            [max(0, total) for total in totals], more_at_end=mode == "SAME_UPPER"
        )
    elif mode != "VALID":
        reason = f"auto_pad is {mode}"
        raise call.refuse(reason)
    windows = Windows(tuple(kernel), strides, dilations, begin, end)
    if min(windows.counts(sizes), default=1) < 1:
        reason = f"windows of {windows.extents} do not fit into images of {tuple(sizes)}"
        raise call.refuse(reason)
    return windows


def split_padding(
    totals: Sequence[int], *, more_at_end: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return padding before and after, of which an odd element goes to one side."""
    less = tuple(total // 2 for total in totals)
    more = tuple(total - part for total, part in zip(totals, less, strict=True))
    return (less, more) if more_at_end else (more, less)


def per_axis(call: Call, name: str, rank: int, default: int = 1) -> tuple[int, ...]:
    """Return an attribute that has one entry per spatial axis.

    Raises:
        ModelError: It has another number of entries.
    """
    values = tuple(call.integers(name, [default] * rank))
    if len(values) != rank:
        reason = f"{name} has {len(values)} entries for {rank} spatial axes"
        raise call.refuse(reason)
    return values


def pads_of(call: Call, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the attribute `pads`: what goes before and what goes after every axis.

    Raises:
        ModelError: It has another number of entries than two per axis.
    """
    pads = tuple(call.integers("pads", [0] * (2 * rank)))
    if len(pads) != 2 * rank:
        reason = f"pads has {len(pads)} entries for {rank} spatial axes"
        raise call.refuse(reason)
    return pads[:rank], pads[rank:]


def plane_offsets(x: Tensor, plane: int) -> Tensor:
    """Return where each channel of each sample starts in flat memory, [N, C, 1, ...]."""
    samples, channels = x.shape[:BATCH_AND_CHANNELS]
    starts = torch.arange(samples * channels, device=x.device) * plane
    return starts.reshape(samples, channels, *[1] * (x.dim() - BATCH_AND_CHANNELS))
