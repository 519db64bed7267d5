"""Walking a tensor in tiles of `[rows, groups]` float32 that stay in cache.

Every sum is an elementwise accumulation in row order, so a result depends neither on the SIMD width
of the CPU nor on which other groups share the tile.
"""

from collections.abc import Iterator
from math import prod

import numpy as np
import numpy.typing as npt

from qcompiler.quant.grouping import Array, Box, boxes
from qcompiler.quant.packing import IntArray

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_TILE = 1 << 19
"""Elements of a tile (2 MB): more leave the cache; with fewer, threads of a caller spend their time
handing the interpreter lock to each other between NumPy calls."""
_TILE_ROWS = 256
"""Rows of a tile. Fixed, since the order of sums depends on it."""
_STRIP = 1 << 20
"""Elements of a strip that is kept as float32 (4 MB) while its groups are searched."""
_NARROWEST = 16
"""Groups below which NumPy's inner loops are too short: such strips are read again instead."""
_TRANSPOSED_GROUPS = 64
"""Groups transposed at once: their cache lines, one per group, then stay in the L1 cache."""
_SLOTS = 5
"""Arrays of numbers per group that can be in use at once."""


class Strip:
    """Some groups of a section with all their rows, as one or more tiles.

    Attributes:
        groups: The strip's place on the group axes of the section.
        count: Number of groups.
    """

    def __init__(self, section: Array, groups: Box, tile_rows: list[Box], buffers: "_Buffers"):
        self.groups = groups
        self.count = prod(part.stop - part.start for part in groups)
        self._section = section
        self._tile_rows = tile_rows
        self._buffers = buffers
        self._loaded = False
        extents = tuple(part.stop - part.start for part in groups)
        limit = _TRANSPOSED_GROUPS if _is_transposed(section) else self.count
        self._copies = [(slice(None), slice(None), *part) for part in boxes(extents, limit)]

    def per_group(self, slot: int, values: F32) -> F32:
        """Copy `[groups]` numbers that are to be broadcast over tiles into scratch `slot`.

        Operands on the small-object heap made NumPy's broadcast loops up to eight times slower in
        some processes and not in others; those in a large allocation never did.
        """
        row = self._buffers.per_group[slot, : self.count]
        row[...] = values
        return row

    def tiles(self) -> Iterator["Tile"]:
        """Yield the tiles in row order; a tile is valid until the next one is asked for."""
        start = 0
        for rows in self._tile_rows:
            box = (*rows, *self.groups)
            shape = tuple(part.stop - part.start for part in box)
            stop = start + shape[0] * shape[1]
            tile = Tile(self._buffers, (start, stop), box, shape, self._copies)
            if not self._loaded:
                tile.load(self._section)
            yield tile
            start = stop if self._buffers.keeps_strip else 0
        self._loaded = self._buffers.keeps_strip


class _Buffers:
    """Preallocated memory that the strips of one section share: at most about 11.5 MB."""

    def __init__(self, group_size: int, group_count: int, tile_rows: int) -> None:
        rows = min(group_size, tile_rows)
        groups = _TILE // rows
        self.keeps_strip = group_size * min(_NARROWEST, group_count) <= _STRIP
        if self.keeps_strip:
            groups = min(groups, _STRIP // group_size)
        self.groups = min(groups, group_count)
        self.values = np.empty((group_size if self.keeps_strip else rows) * self.groups, np.float32)
        self.quotient = np.empty(rows * self.groups, np.float32)
        self.rounded = np.empty(rows * self.groups, np.float32)
        self.importance = np.empty(rows * self.groups, np.float32)
        self.per_group = np.empty((_SLOTS, max(self.groups, 1 << 16)), np.float32)
        self.codes = np.empty(rows * self.groups, np.int8)


class Tile:
    """A `[rows, groups]` block of values with three scratch arrays of its shape.

    Attributes:
        values: float32 `[rows, groups]`, contiguous.
        quotient: Scratch, same shape.
        rounded: Scratch, same shape.
        importance: Scratch, same shape.
    """

    def __init__(
        self,
        buffers: _Buffers,
        rows: tuple[int, int],
        box: Box,
        shape: tuple[int, ...],
        copies: list[Box],
    ) -> None:
        count, groups = rows[1] - rows[0], prod(shape[2:])
        self.values = buffers.values[rows[0] * groups : rows[1] * groups].reshape(count, groups)
        self.quotient = buffers.quotient[: count * groups].reshape(count, groups)
        self.rounded = buffers.rounded[: count * groups].reshape(count, groups)
        self.importance = buffers.importance[: count * groups].reshape(count, groups)
        self._codes = buffers.codes
        self._box = box
        self._shape = shape
        self._copies = copies

    def load(self, section: Array) -> None:
        """Read `values` from their place."""
        source, target = section[self._box], self.values.reshape(self._shape)
        for part in self._copies:
            target[part] = source[part]

    def store(self, section: IntArray) -> None:
        """Write `rounded`, numbers of the section's dtype, to its place."""
        source, target = self.rounded.reshape(self._shape), section[self._box]
        for part in self._copies:
            steps = source[part]
            # Narrowed first, since a transposing copy of single bytes is the faster one.
            codes = self._codes[: steps.size].view(section.dtype).reshape(steps.shape)
            np.copyto(codes, steps, casting="unsafe")
            target[part] = codes


def strips(section: Array, *, per_tensor: bool) -> Iterator[Strip]:
    """Split a section, which must not be empty, into strips in order.

    Args:
        section: Values with axes `(r0, r1, g0, g1, g2)`.
        per_tensor: The one group is the tensor: no slice has to give the same sums, and tiles of a
            single column may be tall.
    """
    group_count = prod(section.shape[2:])
    tile_rows = _TILE if per_tensor else _TILE_ROWS
    buffers = _Buffers(section.shape[0] * section.shape[1], group_count, tile_rows)
    rows = list(boxes(section.shape[:2], tile_rows))
    for groups in boxes(section.shape[2:], buffers.groups):
        yield Strip(section, groups, rows, buffers)


def sum_rows(tile: F32) -> F32:
    """Add up the rows of a contiguous `[rows, groups]` from first to last, per group.

    Overwrites the tile. NumPy adds row to row where there are several columns, but pairwise where
    there is one: the running sum keeps that case in the same order.
    """
    if tile.shape[1] == 1:
        return np.asarray(np.add.accumulate(tile[:, 0], out=tile[:, 0])[-1:])
    return np.asarray(np.add.reduce(tile, axis=0))


def _is_transposed(section: Array) -> bool:
    """Whether neighbours in memory share a group."""
    steps = [
        (abs(stride), axis)
        for axis, (stride, extent) in enumerate(zip(section.strides, section.shape, strict=True))
        if extent > 1
    ]
    return bool(steps) and min(steps)[1] < 2
