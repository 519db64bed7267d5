"""What a window reads and should give, call by call or several calls at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.reconstruction.joined_calls import Fed, feed_shapes, stacked

Branches = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some calls.

    Attributes:
        feeds: What the window reads.
        targets: What it should give, one tuple of outputs for every branch.
        keep: Which tokens count, bool `[batch, tokens]`; None where all do.
        calls: How many calls it holds.
    """

    feeds: Fed
    targets: Branches
    keep: Tensor | None
    calls: int = 1


class WindowData:
    """Gives batches of calls.

    Calls are joined along their first axis where they have equal shapes and the window gives for
    all of them together what it gives for each.
    """

    def __init__(
        self,
        feeds: Callable[[int], Fed],
        targets: Callable[[int], Branches],
        keep: Callable[[int], Tensor | None],
        *,
        joins: bool,
    ) -> None:
        """Remember where data comes from.

        Args:
            feeds: Returns what the window reads in a call.
            targets: Returns what it should give.
            keep: Returns which tokens count.
            joins: Whether calls may be joined.
        """
        self._feeds = feeds
        self._targets = targets
        self._keep = keep
        self._joins = joins

    def batches(self, calls: Sequence[int], most: int) -> list[Batch]:
        """Return calls in their order, up to `most` in a batch."""
        found: list[Batch] = []
        pending: list[Batch] = []
        for call in calls:
            one = Batch(self._feeds(call), self._targets(call), self._keep(call))
            fits = self._joins and len(pending) < most
            if pending and not (fits and _shapes(one) == _shapes(pending[0])):
                found.append(_joined(pending))
                pending = []
            pending.append(one)
        return [*found, _joined(pending)] if pending else found


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    branches = zip(*(each.targets for each in batches), strict=True)
    targets = tuple(
        tuple(torch.cat(outputs) for outputs in zip(*branch, strict=True)) for branch in branches
    )
    masks = [each.keep for each in batches]
    some = next((mask for mask in masks if mask is not None), None)
    keep = None
    if some is not None:
        whole = torch.ones_like(some)
        keep = torch.cat([whole if mask is None else mask for mask in masks])
    return Batch(stacked([each.feeds for each in batches]), targets, keep, len(batches))


def _shapes(batch: Batch) -> tuple[object, ...]:
    targets = tuple(tuple(each.shape) for branch in batch.targets for each in branch)
    return (feed_shapes(batch.feeds), targets)
