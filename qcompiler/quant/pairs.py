"""Codes that integer kernels without VNNI cannot saturate with: see `PairLimit`."""

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.quant.arithmetic import round_scale
from qcompiler.quant.grouping import Array
from qcompiler.quant.packing import IntArray
from qcompiler.quant.scheme import PairLimit

Rows = npt.NDArray[np.float32]


def reduction_rows(values: Array, axis: int, pairs: PairLimit) -> Array:
    """Return `values` as `[channels, K]`, K in the order of the kernel's sum.

    Args:
        values: A weight of any rank.
        axis: Its axis of output channels.
        pairs: Gives the other axes, in order.

    Raises:
        ValueError: The axes of `pairs` and `axis` are not all axes of `values`, once each.
    """
    order = (axis, *pairs.axes)
    if sorted(order) != list(range(values.ndim)):
        message = f"the axes {order} are not those of a tensor of rank {values.ndim}"
        raise ValueError(message)
    turned = values.transpose(order)
    return turned.reshape(turned.shape[0], -1)


def restore_rows(rows: Array, shape: tuple[int, ...], axis: int, pairs: PairLimit) -> Array:
    """Undo `reduction_rows` for a tensor of `shape`."""
    order = (axis, *pairs.axes)
    turned = rows.reshape([shape[index] for index in order])
    return turned.transpose(np.argsort(order))


def quantize_rows(
    rows: Rows,
    pairs: PairLimit,
    qmax: int,
    scale_dtype: npt.DTypeLike,
    least_scale: Rows | None = None,
) -> tuple[IntArray, Array]:
    """Round rows symmetrically, each with the smallest scale that keeps its pairs in bounds.

    The scale is `max(max|value| / qmax, largest pair sum / limit)`. Rounding can take a pair one
    step beyond the limit; then the code that was rounded up furthest goes down a step.

    Args:
        rows: float32 `[channels, K]`, finite.
        pairs: The limit.
        qmax: Largest code; the smallest is -qmax.
        scale_dtype: float32, float16 or bfloat16.
        least_scale: `[channels]`, below which no scale may be, or None.

    Returns:
        int8 codes `[channels, K]`, and scales `[channels]`.
    """
    magnitude = np.abs(rows).max(axis=1, initial=0.0)
    wanted = np.maximum(magnitude / qmax, _largest_pair_sums(rows) / pairs.limit)
    if least_scale is not None:
        wanted = np.maximum(wanted, least_scale)
    scale = round_scale(wanted, scale_dtype)
    exact = rows / scale.astype(np.float32)[:, np.newaxis]
    codes = np.clip(np.rint(exact), -qmax, qmax)
    _trim(codes, exact, pairs.limit)
    return codes.astype(np.int8), scale


def _largest_pair_sums(rows: Rows) -> npt.NDArray[Any]:
    first, second = _neighbours(rows)
    positive = np.maximum(first, 0) + np.maximum(second, 0)
    negative = np.maximum(-first, 0) + np.maximum(-second, 0)
    largest: npt.NDArray[Any] = np.maximum(positive, negative).max(axis=1, initial=0.0)
    return largest


def _neighbours(rows: Rows) -> tuple[Rows, Rows]:
    """Return the codes that are multiplied together; one without a partner cannot saturate."""
    even = rows.shape[1] // 2 * 2
    return rows[:, 0:even:2], rows[:, 1:even:2]


def _trim(codes: Rows, exact: Rows, limit: int) -> None:
    """Take pairs beyond the limit back to it, in place."""
    first, second = _neighbours(codes)
    excess = np.where(first * second > 0, np.abs(first) + np.abs(second) - limit, 0)
    beyond = excess > 0
    if not beyond.any():
        return
    raised = [
        np.abs(code) - np.abs(value)
        for code, value in zip((first, second), _neighbours(exact), strict=True)
    ]
    take_first = raised[0] >= raised[1]
    for side, chosen in ((first, take_first), (second, ~take_first)):
        side[...] = np.where(beyond & chosen, side - np.sign(side) * excess, side)
