"""Which channels of which values must be scaled by one and the same number."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
"""Channel numbers, one axis per axis of a value: extent 1 along an axis says that all positions
along it belong to one channel. A [batch, tokens, C] value has ids of shape [1, 1, C]."""


class ChannelClasses:
    """Channels in disjoint sets: those of one set are scaled by the same number, or not at all."""

    def __init__(self) -> None:
        self._parent = np.empty(0, np.int64)
        self._reasons: dict[int, str] = {}

    def new(self, shape: Sequence[int]) -> Ids:
        """Return numbers of new channels, each in a set of its own."""
        start, count = len(self._parent), int(np.prod(shape, dtype=np.int64))
        ids = np.arange(start, start + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, ids])
        return ids.reshape(shape)

    def roots(self, ids: Ids) -> Ids:
        """Return the one number that stands for the set of each channel."""
        found = self._parent[ids]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                return found
            found = above

    def unite(self, one: Ids, other: Ids) -> None:
        """Join the sets of channels at the same places; shapes broadcast."""
        first, second = np.broadcast_arrays(self.roots(one), self.roots(other))
        pairs = np.stack([first.ravel(), second.ravel()])
        for a, b in np.unique(pairs[:, pairs[0] != pairs[1]], axis=1).T:
            low, high = sorted((self._root(int(a)), self._root(int(b))))
            if low == high:
                continue
            self._parent[high] = low
            if high in self._reasons:
                self._reasons.setdefault(low, self._reasons.pop(high))

    def fix(self, ids: Ids, reason: str) -> None:
        """Say that these channels cannot be scaled; the first reason of a set stays."""
        for root in np.unique(self.roots(ids)):
            self._reasons.setdefault(int(root), reason)

    def reasons(self, ids: Ids) -> list[str]:
        """Return why some of the channels cannot be scaled, each sentence once."""
        roots = dict.fromkeys(int(root) for root in self.roots(ids).ravel())
        return list(dict.fromkeys(self._reasons[root] for root in roots if root in self._reasons))

    def is_fixed(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which of the channels cannot be scaled."""
        if not self._reasons:
            return np.zeros(ids.shape, np.bool_)
        return np.isin(self.roots(ids), list(self._reasons))

    def _root(self, index: int) -> int:
        while self._parent[index] != index:
            index = int(self._parent[index])
        return index


def merged_along(classes: ChannelClasses, ids: Ids, axes: Sequence[int]) -> Ids:
    """Join all channels along some axes into one, and return ids of extent 1 there."""
    for axis in axes:
        if ids.shape[axis] > 1:
            first = ids.take([0], axis=axis)
            classes.unite(first, ids)
            ids = first
    return ids
