"""Choosing the range of an activation from what is known of its values.

A range is (lo, hi) with lo <= 0 <= hi: zero is on every grid. Symmetric ranges are (-m, m).
"""

from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.entropy import entropy_threshold
from qcompiler.calibration.grid_error import RoundingError
from qcompiler.calibration.histogram import F64, Histogram
from qcompiler.calibration.statistics import TensorStatistics
from qcompiler.errors import UsageError
from qcompiler.quant.qtype import QType
from qcompiler.quant.ranges import sqnr_db


class Observer(StrEnum):
    """How a range is chosen."""

    MIN_MAX = "min-max"
    """All values."""
    PERCENTILE = "percentile"
    """All but a share of the values: of the magnitudes for symmetric ranges, half of it on either
    side for asymmetric ones, and all of it on the one side of values of one sign."""
    MSE = "mse"
    """The range of least squared error that a search finds; never worse than min-max."""
    ENTROPY = "entropy"
    """The range whose codes keep most of the distribution of the magnitudes, as TensorRT's
    entropy calibration and ONNX Runtime's measure it. An asymmetric range is the symmetric one,
    cut where the values end. It counts codes of equal width, and so has none for floats."""

    @property
    def needs_histogram(self) -> bool:
        """Whether smallest and largest value do not suffice."""
        return self is not Observer.MIN_MAX

    def knows(self, qtype: QType) -> bool:
        """Whether it can choose ranges for codes of a type."""
        return self is not Observer.ENTROPY or not qtype.floating


DEFAULT_PERCENTILE: Final = 99.99

_LADDER: Final = 2.0 ** (-np.arange(0, 8) / 2)
"""Shares of the whole range tried first, by factors of sqrt(2)."""
_SMALLEST_SHARE: Final = 2.0**-40
_HOPELESS: Final = 2.0
"""A range this many times as wrong as the best has clipped more than any smaller one can regain:
rounding errors only fall on the way down."""
_COARSE: Final = np.geomspace(2.0**-0.5, 2.0**0.5, 7)
_FINE: Final = np.geomspace(2.0 ** (-1 / 6), 2.0 ** (1 / 6), 7)
"""Factors tried around the best share so far, one set after the other."""


def choose_range(
    statistics: TensorStatistics,
    observer: Observer,
    qtype: QType,
    symmetric: bool,
    *,
    percentile: float = DEFAULT_PERCENTILE,
) -> tuple[float, float]:
    """Return the range to map to the codes of a type.

    Args:
        statistics: What the tensor held.
        observer: How to choose.
        qtype: Type of the codes.
        symmetric: Whether the zero point is to be the middle of the codes.
        percentile: For that observer: percent of the values to keep, above 0, at most 100.

    Returns:
        (lo, hi), lo <= 0 <= hi, within the values (symmetric: their magnitudes); lo is 0 when no
        value is negative and the range asymmetric, and (0, 0) means that all values are zero.

    Raises:
        UsageError: The observer needs a histogram and there is none, has no meaning for the type,
            or the percentile is not one.
    """
    if not observer.knows(qtype):
        message = f"the observer {observer} counts codes of equal width, which {qtype} has not"
        raise UsageError(
            message, hint="give --observer mse, percentile or min-max, or none of them"
        )
    low, high = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    if symmetric:
        high = max(high, -low)
        low = -high
    if not observer.needs_histogram or low == high:
        return low, high
    histogram = _histogram_of(statistics, observer.value)
    if observer is Observer.PERCENTILE:
        return _percentile_range(histogram, symmetric, percentile)
    if observer is Observer.ENTROPY:
        one_sided = not symmetric and 0.0 in (low, high)
        codes = qtype.qmax - qtype.qmin + 1
        threshold = entropy_threshold(histogram, codes if one_sided else codes // 2)
        return max(low, -threshold), min(high, threshold)
    return _mse_range(RoundingError(histogram, qtype, symmetric=symmetric), low, high, symmetric)


def activation_sqnr_db(
    statistics: TensorStatistics, qtype: QType, lo: float, hi: float, symmetric: bool
) -> float:
    """Return the signal to quantization noise ratio to expect of a range, in dB.

    Infinite where nothing is lost, as for a tensor of zeros.

    Raises:
        UsageError: There is no histogram.
    """
    histogram = _histogram_of(statistics, "the expected error")
    error = RoundingError(histogram, qtype, symmetric=symmetric)
    noise = float(error.of(np.array([lo]), np.array([hi]))[0])
    return sqnr_db(error.signal, noise)


def _histogram_of(statistics: TensorStatistics, what: str) -> Histogram:
    if statistics.histogram is None:
        message = f"{what} needs a histogram, and the statistics hold only extremes"
        raise UsageError(message, hint="collect them again for this observer")
    return statistics.histogram


def _percentile_range(
    histogram: Histogram, symmetric: bool, percentile: float
) -> tuple[float, float]:
    if not 0 < percentile <= 100:
        message = f"{percentile} is no percentile"
        raise UsageError(message, hint="give one above 0 and at most 100, such as 99.99")
    lower, upper = histogram.edges
    cut = 1 - percentile / 100
    if symmetric:
        near = np.minimum(np.abs(lower), np.abs(upper))
        far = np.maximum(np.abs(lower), np.abs(upper))
        order = np.argsort(near, kind="stable")
        threshold = _quantile(near[order], far[order], histogram.counts[order], 1 - cut)
        return -threshold, threshold
    if histogram.minimum < 0 < histogram.maximum:
        cut /= 2
    lo = _quantile(lower, upper, histogram.counts, cut) if histogram.minimum < 0 else 0.0
    hi = _quantile(lower, upper, histogram.counts, 1 - cut) if histogram.maximum > 0 else 0.0
    return min(lo, 0.0), max(hi, 0.0)


def _quantile(lower: F64, upper: F64, counts: npt.NDArray[np.int64], share: float) -> float:
    """Return the value below which a share of the counts lies, linear inside a bin.

    Bins are in order; the two bins of one magnitude may overlap, and count one after the other.
    """
    below = np.cumsum(counts)
    target = share * below[-1]
    place = min(int(np.searchsorted(below, target)), len(below) - 1)
    inside = 1 - (below[place] - target) / counts[place]
    return float(lower[place] + (upper[place] - lower[place]) * min(max(inside, 0.0), 1.0))


def _mse_range(
    error: RoundingError, low: float, high: float, symmetric: bool
) -> tuple[float, float]:
    """Shrink both ends together, then either by itself, then both a little once more."""
    search = _Shares(error, low, high)
    search.descend(move_low=True, move_high=True)
    if not symmetric and low < 0 < high:
        search.descend(move_low=True, move_high=False)
        search.descend(move_low=False, move_high=True)
        search.refine(_FINE, move_low=True, move_high=False)
        search.refine(_FINE, move_low=False, move_high=True)
    return low * search.low, high * search.high


class _Shares:
    """The best shares of the two ends of a range that were found so far.

    Attributes:
        low: Share of the lower end, 0..1.
        high: Share of the upper end, 0..1.
    """

    def __init__(self, error: RoundingError, low: float, high: float) -> None:
        self.low = self.high = 1.0
        self._ends = (low, high)
        self._error = error
        self._least = np.inf

    def descend(self, *, move_low: bool, move_high: bool) -> None:
        """Search from the whole range down."""
        ladder = _LADDER
        while ladder[0] > _SMALLEST_SHARE:
            lows = ladder if move_low else np.full(len(ladder), self.low)
            highs = ladder if move_high else np.full(len(ladder), self.high)
            if self._try(lows, highs) > _HOPELESS * self._least:
                break
            ladder = ladder * (_LADDER[-1] * _LADDER[1])
        self.refine(_COARSE, move_low=move_low, move_high=move_high)
        self.refine(_FINE, move_low=move_low, move_high=move_high)

    def refine(self, factors: F64, *, move_low: bool, move_high: bool) -> None:
        """Search around the best shares."""
        one = np.ones(len(factors))
        lows = np.minimum(self.low * (factors if move_low else one), 1.0)
        highs = np.minimum(self.high * (factors if move_high else one), 1.0)
        self._try(lows, highs)

    def _try(self, lows: F64, highs: F64) -> float:
        """Keep the best of some shares if it is better; return the error of the last."""
        errors = self._error.of(self._ends[0] * lows, self._ends[1] * highs)
        place = int(np.argmin(errors))
        if errors[place] < self._least:
            self._least = float(errors[place])
            self.low, self.high = float(lows[place]), float(highs[place])
        return float(errors[-1])
