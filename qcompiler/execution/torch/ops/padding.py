"""Pad and CenterCropPad (ONNX operators, `Operators.md`)."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.moving import moves_elements

TABLE = OpTable()
_EXACT: Final = 1 << 53
"""PyTorch takes the value to pad with as a double."""
_NATIVE_MODES: Final = {"reflect": "reflect", "edge": "replicate"}
_MODES_SINCE: Final = {"constant": 1, "reflect": 1, "edge": 1, "wrap": 19}

Widths = list[tuple[int, int]]
"""Elements to add before and after, for every axis; negative ones are taken away."""


@TABLE.op("Pad", all_types=True)
@moves_elements()
def pad_by_attributes(call: Call, x: Tensor) -> Tensor:
    """Return x with elements added around it, as attributes say."""
    pads = call.integers("paddings" if call.version < 2 else "pads")
    value = torch.tensor(call.number("value", 0.0), dtype=x.dtype)
    return _padded(call, x, _widths(x.dim(), range(x.dim()), pads), value)


@TABLE.op("Pad", since=11, host=(1, 2, 3), all_types=True)
@moves_elements()
def pad(
    call: Call, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Return x with elements added around it, or taken away where `pads` is negative.

    Where elements are taken away, the modes other than `constant` go by what is left.
    """
    places = range(x.dim()) if axes is None else axes.tolist()
    return _padded(call, x, _widths(x.dim(), places, pads.tolist()), value)


@TABLE.op("CenterCropPad", since=18, host=(1,), all_types=True)
@moves_elements()
def center_crop_pad(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """Return the middle of x in another shape, with zeros around it where x is smaller."""
    axes = call.integers("axes", range(x.dim()))
    widths: Widths = [(0, 0)] * x.dim()
    for axis, size in zip(axes, shape.tolist(), strict=True):
        added = size - x.shape[axis]
        before = added // 2 if added > 0 else -(-added // 2)
        widths[axis] = (before, added - before)
    return _padded_constant(x, widths, None)


def _widths(rank: int, axes: Sequence[int], pads: Sequence[int]) -> Widths:
    widths: Widths = [(0, 0)] * rank
    count = len(axes)
    for axis, before, after in zip(axes, pads[:count], pads[count:], strict=True):
        widths[axis] = (before, after)
    return widths


def _padded(call: Call, x: Tensor, widths: Widths, value: Tensor | None) -> Tensor:
    mode = call.text("mode", "constant")
    if call.version < _MODES_SINCE.get(mode, call.version + 1):
        reason = f"version {call.version} has no mode {mode}"
        raise call.refuse(reason)
    if mode == "constant":
        return _padded_constant(x, widths, value)
    x = _padded_constant(x, [(min(0, before), min(0, after)) for before, after in widths], None)
    widths = [(max(0, before), max(0, after)) for before, after in widths]
    if _is_native(x, widths, mode):
        spatial = _flat(widths)[: 2 * (x.dim() - 2)]
        return functional.pad(x, spatial, mode=_NATIVE_MODES[mode])
    for axis, (before, after) in enumerate(widths):
        if before or after:
            places = _places(mode, x.shape[axis], before, after)
            x = x.index_select(axis, places.to(x.device))
    return x


def _padded_constant(x: Tensor, widths: Widths, value: Tensor | None) -> Tensor:
    flat = _flat(widths)
    if not any(flat):
        return x
    if value is None:
        return functional.pad(x, flat)
    number = value.item()
    if not value.requires_grad and abs(number) < _EXACT:
        return functional.pad(x, flat, value=number)
    inside = functional.pad(torch.ones_like(x, dtype=torch.bool), flat)
    fill = value.reshape(()).to(x.device, x.dtype)
    return torch.where(inside, functional.pad(x, flat), fill)


def _flat(widths: Widths) -> list[int]:
    """Return widths as PyTorch takes them: the last axis first."""
    return [width for pair in reversed(widths) for width in pair]


def _is_native(x: Tensor, widths: Widths, mode: str) -> bool:
    """Whether PyTorch has a kernel: floats [N, C, ...], padded within the spatial axes."""
    spatial = zip(x.shape[2:], widths[2:], strict=True)
    return (
        mode in _NATIVE_MODES
        and x.is_floating_point()
        and x.dim() in (3, 4, 5)
        and not any(map(any, widths[:2]))
        and all(max(pair) < size for size, pair in spatial)
    )


def _places(mode: str, length: int, before: int, after: int) -> Tensor:
    """Return where the elements of a padded axis come from."""
    places = torch.arange(-before, length + after)
    if mode == "edge":
        return places.clamp(0, length - 1)
    if mode == "wrap":
        return places % length
    period = max(1, 2 * (length - 1))
    turned = places % period
    return torch.minimum(turned, period - turned).clamp(max=length - 1)
