"""How the channels of a value lie in another shape of it."""

from collections.abc import Sequence
from math import prod

import numpy as np

from qcompiler.ir.channels.classes import Ids

Extent = int | str | None
"""An extent of a value: a number, the name of a symbol, or unknown."""

_Segment = tuple[range, range]
"""Axes of both shapes that hold the same elements."""


def reshaped(ids: Ids, source: Sequence[Extent], target: Sequence[Extent]) -> Ids | None:
    """Return the ids of a value after Reshape, None where that cannot be told from the shapes.

    Row-major order makes runs of axes correspond whose extents have the same product. Those that
    have numbers, or the same symbol, are matched from both ends; what lies between may be
    unknown as long as no channels lie along it.

    Args:
        ids: Ids of the value in the shape `source`.
        source: Extents of the value.
        target: Extents it is reshaped to.
    """
    expanded, result = list(ids.shape), [1] * len(target)
    for before, after in _segments(source, target):
        if all(ids.shape[axis] == 1 for axis in before):
            continue
        sizes = [source[axis] for axis in before], [target[axis] for axis in after]
        numbers = [[size for size in side if isinstance(size, int)] for side in sizes]
        if len(numbers[0]) != len(before) or len(numbers[1]) != len(after):
            if len(before) == len(after) == 1 and sizes[0] == sizes[1]:
                numbers = [[ids.shape[before[0]]]] * 2
            else:
                return None
        for axis, size in zip(before, numbers[0], strict=True):
            expanded[axis] = size
        for axis, size in zip(after, numbers[1], strict=True):
            result[axis] = size
    if prod(expanded) != prod(result):
        return None
    return np.broadcast_to(ids, expanded).reshape(result)


def _segments(source: Sequence[Extent], target: Sequence[Extent]) -> list[_Segment]:
    head = _matched(source, target)
    used = (head[-1][0].stop, head[-1][1].stop) if head else (0, 0)
    rest = source[used[0] :], target[used[1] :]
    tail = _matched(rest[0][::-1], rest[1][::-1])
    ends = (len(source), len(target))
    last = [
        (range(ends[0] - a.stop, ends[0] - a.start), range(ends[1] - b.stop, ends[1] - b.start))
        for a, b in reversed(tail)
    ]
    stop = (last[0][0].start, last[0][1].start) if last else ends
    return [*head, (range(used[0], stop[0]), range(used[1], stop[1])), *last]


def _matched(source: Sequence[Extent], target: Sequence[Extent]) -> list[_Segment]:
    """Match runs of axes from the front, as far as that is certain."""
    found: list[_Segment] = []
    i = j = 0
    while i < len(source) and j < len(target):
        one, other = source[i], target[j]
        if one is not None and one == other:
            stop = (i + 1, j + 1)
        elif isinstance(one, int) and isinstance(other, int):
            run = _equal_products(source, target, i, j)
            if run is None:
                return found
            stop = run
        else:
            return found
        found.append((range(i, stop[0]), range(j, stop[1])))
        i, j = stop
    return found


def _equal_products(
    source: Sequence[Extent], target: Sequence[Extent], i: int, j: int
) -> tuple[int, int] | None:
    """Return where runs that begin at `i` and `j` end so that their products are equal."""
    one, other = 1, 1
    start = (i, j)
    while one != other or (i, j) == start:
        behind = one <= other
        shape, place = (source, i) if behind else (target, j)
        size = shape[place] if place < len(shape) else None
        if not isinstance(size, int) or size == 0:
            return None
        if behind:
            one, i = one * size, i + 1
        else:
            other, j = other * size, j + 1
    return i, j
