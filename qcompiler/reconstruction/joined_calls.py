"""Several calls at once, where that gives for each what it gives alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from qcompiler.execution.torch.element_types import Array

Fed = dict[str, Tensor | Array]
_MOST_BYTES: Final = 32 << 20
"""Of what is fed at once."""


def run_joined(
    run: Callable[[Fed], Sequence[Tensor]], feeds: Iterable[Fed], most: int
) -> Iterator[Sequence[Tensor]]:
    """Yield what a program gives for each call, in order.

    Neighbours of equal shapes run joined along their first axes, if two of them give joined what
    each gives alone. Where memory runs out, half of them do.

    Args:
        run: The program.
        feeds: Of the calls.
        most: Calls at once, 1 to join none.
    """
    joins: dict[object, bool] = {}
    for group in _groups(feeds, most):
        shapes = feed_shapes(group[0])
        if len(group) > 1 and shapes not in joins:
            joins[shapes] = can_join(run, group[:2])
        if len(group) > 1 and joins[shapes]:
            yield from _split(run, group)
        else:
            yield from map(run, group)


def _groups(feeds: Iterable[Fed], most: int) -> Iterator[list[Fed]]:
    group: list[Fed] = []
    for each in feeds:
        size = sum(value.nbytes for value in each.values())
        full = len(group) >= min(most, max(1, _MOST_BYTES // max(1, size)))
        if group and (full or feed_shapes(each) != feed_shapes(group[0])):
            yield group
            group = []
        group.append(each)
    if group:
        yield group


def _split(run: Callable[[Fed], Sequence[Tensor]], group: Sequence[Fed]) -> list[Sequence[Tensor]]:
    """Return what each call of a group gives, computed at once if memory suffices."""
    if len(group) == 1:
        return [run(group[0])]
    try:
        found = run(stacked(group))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return list(zip(*(each.chunk(len(group)) for each in found), strict=True))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(group) // 2
    return [*_split(run, group[:middle]), *_split(run, group[middle:])]


def can_join(
    run: Callable[[Fed], Sequence[Tensor]], feeds: Sequence[Fed], tolerance: float = 1e-3
) -> bool:
    """Whether a window gives for several calls joined what it gives for each.

    Args:
        run: The window.
        feeds: Two calls or more.
        tolerance: Largest error allowed, as a part of the largest value.
    """
    if len({feed_shapes(each) for each in feeds}) > 1:
        return False
    if any(not isinstance(v, Tensor) or not v.dim() for each in feeds for v in each.values()):
        return False
    with torch.no_grad():
        single = [run(each) for each in feeds]
        try:
            joined = run(stacked(feeds))
        except (RuntimeError, ValueError, IndexError):
            return False
    for index, found in enumerate(joined):
        if any(not each[index].dim() for each in single):
            return False
        expected = torch.cat([each[index] for each in single])
        if found.shape != expected.shape:
            return False
        largest = expected.abs().max() if expected.numel() else expected.new_zeros(())
        if not bool((found - expected).abs().max() <= tolerance * largest):
            return False
    return True


def stacked(feeds: Sequence[Fed]) -> Fed:
    """Return calls of equal shapes joined along their first axes."""
    first = feeds[0]
    found: Fed = {}
    for name in first:
        parts = [each[name] for each in feeds]
        found[name] = torch.cat([part for part in parts if isinstance(part, Tensor)])
    return found


def as_tensor(value: Tensor | Array) -> Tensor:
    """Return a value that is known to be a tensor: anything but text."""
    assert isinstance(value, Tensor)
    return value


def feed_shapes(feeds: Fed) -> tuple[object, ...]:
    """Return names and shapes of what is fed."""
    return tuple((name, tuple(value.shape)) for name, value in feeds.items())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
