"""Histograms of float values that need no range, so that one pass over the data is enough.

A bin is the upper half of the float32 pattern: sign, exponent and 7 bits of the mantissa, which is
the value cut off to bfloat16. There are 65,536 of them, each 1/128 of its power of two wide. An
outlier costs one more bin and moves no other; counts are integers, so neither the order of the
samples nor how they are divided changes anything, and merging is addition.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

BINS: Final = 1 << 16
CHUNK: Final = 1 << 17
"""Elements looked at together: their temporaries (2 MB at most) stay in cache."""
_SIGN: Final = 1 << 15
_INFINITY: Final = 0x7F80
_BEYOND: Final = 2.0**128
"""Upper edge of the last finite bin, which float32 cannot hold."""
_UPPER_HALF = slice(1, None, 2) if sys.byteorder == "little" else slice(0, None, 2)
_LOWER_HALF = slice(0, None, 2) if sys.byteorder == "little" else slice(1, None, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """How many values fell into each bin, for the bins that hold any, in order of value.

    Zeros of either sign share the bin 0 with what is smaller than 2^-133.

    Attributes:
        bins: uint16 `[n]`, the upper halves of the float32 patterns.
        counts: int64 `[n]`, at least 1 each.
        minimum: Smallest value, exactly; 0.0 when there is none.
        maximum: Largest value, exactly; 0.0 when there is none.
        exact: Whether every value is a bfloat16 number: then bins are points, not intervals.
    """

    bins: npt.NDArray[np.uint16]
    counts: npt.NDArray[np.int64]
    minimum: float
    maximum: float
    exact: bool

    @staticmethod
    def from_array(values: Array) -> "Histogram":
        """Return the histogram of float values of any shape.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        builder = HistogramBuilder()
        builder.add(values)
        return builder.finish()

    @property
    def count(self) -> int:
        """How many values there are."""
        return int(self.counts.sum())

    @property
    def is_ordered(self) -> bool:
        """Whether the bins are finite, each there once, and in order of value."""
        ordered = bool((np.diff(_rank(self.bins)) > 0).all())
        return ordered and bool(((self.bins & np.uint16(_SIGN - 1)) < _INFINITY).all())

    @property
    def edges(self) -> tuple[F64, F64]:
        """Lower and upper edge of every bin, `[n]` each, both within minimum..maximum."""
        magnitude = self.bins & np.uint16(_SIGN - 1)
        near = _as_values(magnitude)
        far = near if self.exact else np.where(magnitude == 0, 0, _as_values(magnitude + 1))
        negative = self.bins >= _SIGN
        lower, upper = np.where(negative, -far, near), np.where(negative, -near, far)
        inside = (self.minimum, self.maximum)
        return np.clip(lower, *inside), np.clip(upper, *inside)

    @property
    def centers(self) -> F64:
        """The middle of every bin, `[n]`: its exact value where the bin is a point."""
        lower, upper = self.edges
        return lower + (upper - lower) / 2

    def within(self, low: float, high: float) -> "Histogram":
        """Return the histogram without the bins that lie outside a range.

        Args:
            low: Lower end; the new minimum where it is above the old one.
            high: Upper end.
        """
        lower, upper = self.edges
        kept = (upper >= low) & (lower <= high)
        return Histogram(
            self.bins[kept],
            self.counts[kept],
            max(self.minimum, low),
            min(self.maximum, high),
            self.exact,
        )

    def merge(self, other: "Histogram") -> "Histogram":
        """Return the histogram of the values of both."""
        if not self.count or not other.count:
            return self if self.count else other
        bins, where = np.unique(np.concatenate([self.bins, other.bins]), return_inverse=True)
        counts = np.zeros(len(bins), np.int64)
        np.add.at(counts, where, np.concatenate([self.counts, other.counts]))
        order = np.argsort(_rank(bins))
        return Histogram(
            bins[order],
            counts[order],
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.exact and other.exact,
        )


class HistogramBuilder:
    """Adds values to a histogram; takes 0.8 MB.

    Attributes:
        exact: As in `Histogram`, for the values so far.
    """

    def __init__(self) -> None:
        self.exact = True
        self._counts = np.zeros(BINS, np.int64)
        # Counting walks over all bins, so short arrays are gathered first.
        self._waiting = np.empty(CHUNK, np.uint16)
        self._filled = 0
        self._low, self._high = np.inf, -np.inf

    @property
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value so far, 0.0 when there is none; zeros have no sign."""
        return (self._low, self._high) if self._low <= self._high else (0.0, 0.0)

    def add(self, values: Array) -> None:
        """Add float values of any shape and width; float64 is rounded to float32.

        Raises:
            ValueError: A value is NaN or infinite, as float32; the builder is then useless.
        """
        for chunk in chunks_of(values):
            self.add_chunk(chunk)

    def add_chunk(self, chunk: npt.NDArray[np.float32]) -> None:
        """Add what `chunks_of` gives, as `add` does."""
        low, high = float(chunk.min()), float(chunk.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            message = f"{np.count_nonzero(~np.isfinite(chunk))} values are NaN or infinite"
            raise ValueError(message)
        # Which zero comes out depends on the order of the values: 0.0 + -0.0 is 0.0.
        self._low, self._high = min(self._low, low) + 0.0, max(self._high, high) + 0.0
        halves = chunk.view(np.uint16)
        self.exact = self.exact and not halves[_LOWER_HALF].any()
        bins = halves[_UPPER_HALF]
        if self._filled + len(bins) > CHUNK:
            self._count_waiting()
        self._waiting[self._filled : self._filled + len(bins)] = bins
        self._filled += len(bins)

    def finish(self) -> Histogram:
        """Return the histogram of what was added."""
        self._count_waiting()
        # Negative zeros count as zeros.
        self._counts[0] += self._counts[_SIGN]
        self._counts[_SIGN] = 0
        bins = _in_order(np.flatnonzero(self._counts).astype(np.uint16))
        return Histogram(bins, self._counts[bins], *self.extremes, self.exact)

    def _count_waiting(self) -> None:
        self._counts += np.bincount(self._waiting[: self._filled], minlength=BINS)
        self._filled = 0


def chunks_of(values: Array) -> Iterator[npt.NDArray[np.float32]]:
    """Yield values in order, `[at most CHUNK]` float32 each, contiguous; copies where it must."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        with np.errstate(over="ignore"):
            yield np.ascontiguousarray(flat[start : start + CHUNK], np.float32)


def _rank(bins: npt.NDArray[np.uint16]) -> npt.NDArray[np.int32]:
    """Return numbers that order bins by value: negative patterns grow away from zero."""
    wide = bins.astype(np.int32)
    return np.where(wide >= _SIGN, -wide, wide)


def _in_order(bins: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Return ascending bin numbers in order of the values they stand for."""
    first_negative = int(np.searchsorted(bins, _SIGN))
    return np.concatenate([bins[first_negative:][::-1], bins[:first_negative]])


def _as_values(magnitudes: npt.NDArray[np.uint16]) -> F64:
    """Return the numbers whose float32 patterns have these upper halves and zeros below."""
    with np.errstate(over="ignore"):
        values = (magnitudes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.where(np.isfinite(values), values, _BEYOND)
