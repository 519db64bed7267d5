"""What a measurement on some samples says about all: intervals, and what could have been seen.

Samples are the units: rows of one sample (tokens of a text) depend on each other and are summed
first. Ratios of sums are judged by linearization (Cochran, Sampling Techniques, 1977, chapter 6).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, log10, sqrt
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt

Sums = npt.NDArray[np.float64]
"""One number a sample, `[samples]`."""

_SURE: Final = 0.975
"""Both ends of an interval that holds the truth in 19 of 20 cases."""
_POWER: Final = 0.8
"""How often a difference must be noticed to count as one that can be seen."""
_ENOUGH: Final = 2


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure measured on samples.

    Attributes:
        value: The figure.
        low: Lower end of the interval that holds the true figure in 19 of 20 cases; None where
            there are too few samples for one.
        high: Its upper end.
        visible: The smallest difference that so many samples would show in 4 of 5 cases.
        samples: How many there are.
    """

    value: float
    low: float | None = None
    high: float | None = None
    visible: float | None = None
    samples: int = 0

    def mapped(self, function: Callable[[float], float]) -> "Estimate":
        """Return the estimate of a function of the figure that grows or falls with it."""
        ends = [None if end is None else function(end) for end in (self.low, self.high)]
        if None not in ends and ends[0] > ends[1]:  # type: ignore[operator]
            ends.reverse()
        value = function(self.value)
        visible = None if self.visible is None else abs(function(self.value + self.visible) - value)
        return Estimate(value, ends[0], ends[1], visible, self.samples)


def ratio(numerators: Sums, denominators: Sums) -> Estimate:
    """Estimate the ratio of two sums over samples."""
    value, error, count = _linearized(numerators, denominators)
    if error is None:
        return Estimate(value, samples=count)
    reach = student(count - 1) * error
    return Estimate(value, value - reach, value + reach, _visible(error), count)


def share(hits: Sums, rows: Sums) -> Estimate:
    """Estimate a share of rows by Wilson's interval, for as many as if rows were independent.

    Wilson, Probable inference, 1927; the number is that of simple random rows with this variance
    (the design effect of Kish, Survey Sampling, 1965).
    """
    value, error, count = _linearized(hits, rows)
    if error is None:
        return Estimate(value, samples=count)
    # Where all samples agree, each counts as one row: the least that can be claimed.
    effective = value * (1 - value) / error**2 if error > 0 else float(count)
    z = student(count - 1)  # the variance, too, is estimated from so many samples
    center = (value + z**2 / (2 * effective)) / (1 + z**2 / effective)
    reach = (
        z
        / (1 + z**2 / effective)
        * sqrt(value * (1 - value) / effective + z**2 / (4 * effective**2))
    )
    low, high = max(0.0, center - reach), min(1.0, center + reach)
    visible = _visible(error) if error > 0 else _unseen(count)
    return Estimate(value, min(low, value), max(high, value), visible, count)


def difference(first: Sums, second: Sums, denominators: Sums, *, shares: bool) -> Estimate:
    """Estimate the ratio of second less that of first, measured on the same samples.

    Args:
        first: Numerators of one model.
        second: Numerators of the other.
        denominators: Of both.
        shares: Whether the ratios are shares, so that equal samples still leave doubt.
    """
    found = ratio(second - first, denominators)
    if shares and found.visible == 0.0:
        reach = _unseen(found.samples)
        return Estimate(found.value, found.value - reach, found.value + reach, reach, found.samples)
    return found


def decibels_of(signal: Sums, noise: Sums) -> Estimate:
    """Estimate a signal to noise ratio in dB; infinite where there is no noise."""
    if float(noise.sum()) == 0.0:
        return Estimate(float("inf"), samples=len(noise))
    if not np.isfinite(noise).all() or float(signal.sum()) == 0.0:
        return Estimate(float("-inf"), samples=len(noise))
    found = ratio(noise, signal)
    value = -10 * log10(found.value)
    if found.visible is None or found.low is None:
        return Estimate(value, samples=found.samples)
    error = (found.value - found.low) / found.value
    reach, seen = 10 / log(10) * error, 10 / log(10) * found.visible / found.value
    return Estimate(value, value - reach, value + reach, seen, found.samples)


def exponential(found: Estimate) -> Estimate:
    """Return the estimate of e to the figure."""
    return found.mapped(exp)


def student(freedom: int) -> float:
    """Return the 97.5th percentile of Student's t distribution.

    By Fisher's expansion about the normal distribution (Abramowitz and Stegun 26.7.5) from 3
    degrees of freedom on, where it is within 1 %.
    """
    exact = {1: 12.7062, 2: 4.3027}
    if freedom in exact:
        return exact[freedom]
    z = NormalDist().inv_cdf(_SURE)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    expansion = [term / float(freedom) ** power for power, term in enumerate(terms, start=1)]
    return z + sum(expansion)


def _linearized(numerators: Sums, denominators: Sums) -> tuple[float, float | None, int]:
    """Return a ratio of sums, its standard error, and the number of samples."""
    count = len(numerators)
    total = float(denominators.sum())
    value = float(numerators.sum()) / total if total else float("nan")
    if count < _ENOUGH or not np.isfinite(value):
        return value, None, count
    weights = denominators / total
    # Divided as a jackknife does it: a sample that makes much of the sum pulls it to itself.
    kept = np.maximum(1 - weights, 1 / count)
    deviations = (numerators - value * denominators) / total / kept
    return value, sqrt(float(np.square(deviations).sum())), count


def _visible(error: float) -> float:
    return (NormalDist().inv_cdf(_SURE) + NormalDist().inv_cdf(_POWER)) * error


def _unseen(count: int) -> float:
    """Return the largest share that so many samples miss altogether in 1 of 20 cases."""
    return float(1 - 0.05 ** (1 / count))
