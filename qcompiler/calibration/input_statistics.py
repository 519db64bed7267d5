"""What the values of float inputs look like, so that other data can be held against them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

_MOST_CHANNELS: Final = 4
"""Axes of so many entries at most are taken for the channels of an image."""
_SURE: Final = 4.0
"""Standard errors from which on a shift is no chance: 1 in 16,000, and a few are looked at."""
_CLEARLY: Final = 0.5
"""How much nearer the channels must be in the other order."""
_SCALED: Final = 2.0
"""Ratio of spreads from which on data is called scaled differently."""


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Moments of one float input, over all samples.

    Attributes:
        samples: How many there were.
        axis: The axis of channels, None where all values are taken together.
        mean: Mean of each channel, `[channels]`.
        std: Standard deviation of the values of each channel, `[channels]`.
        spread: Covariance of the means of samples, `[channels][channels]`.
    """

    samples: int
    axis: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    spread: tuple[tuple[float, ...], ...]

    def to_table(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "samples": self.samples,
            "axis": self.axis,
            "mean": list(self.mean),
            "std": list(self.std),
            "spread": [list(row) for row in self.spread],
        }

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "InputStatistics":
        """Read it back.

        Raises:
            KeyError, TypeError, ValueError: It is no such table.
        """
        axis = table["axis"]
        return cls(
            int(table["samples"]),
            None if axis is None else int(axis),
            tuple(float(number) for number in table["mean"]),
            tuple(float(number) for number in table["std"]),
            tuple(tuple(float(number) for number in row) for row in table["spread"]),
        )


@dataclass(slots=True)
class InputMoments:
    """Gathers the statistics of one input, call by call."""

    _axis: int | None = None
    _means: list[npt.NDArray[np.float64]] = field(default_factory=list)
    _squares: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, array: npt.NDArray[Any]) -> None:
        """Add the values of one call, `[samples, ...]` of any float type."""
        if not array.size:
            return
        if not self._means:
            self._axis = _channel_axis(array.shape)
        values = array.astype(np.float64) if array.ndim > 1 else array.astype(np.float64)[None]
        if self._axis is None or self._axis >= values.ndim:
            values = values.reshape(len(values), 1, -1)
        else:
            moved = np.moveaxis(values, self._axis, 1)
            values = moved.reshape(*moved.shape[:2], -1)
        with np.errstate(invalid="ignore", over="ignore"):
            means, squares = values.mean(axis=2), (values**2).mean(axis=2)
        if not self._means or means.shape[1] == self._means[0].shape[1]:
            self._means.append(means)
            self._squares.append(squares)

    def statistics(self) -> InputStatistics | None:
        """Return the statistics; None where there are none, or values that are not finite."""
        if not self._means:
            return None
        means, squares = np.concatenate(self._means), np.concatenate(self._squares)
        if not (np.isfinite(means).all() and np.isfinite(squares).all()):
            return None
        mean = means.mean(axis=0)
        std = np.sqrt(np.maximum(squares.mean(axis=0) - mean**2, 0.0))
        centered = means - mean
        spread = centered.T @ centered / max(1, len(means) - 1)
        return InputStatistics(
            len(means),
            self._axis,
            tuple(_rounded(mean)),
            tuple(_rounded(std)),
            tuple(tuple(_rounded(row)) for row in spread),
        )


@dataclass(frozen=True, slots=True)
class InputShift:
    """How far the values of an input are from those of calibration.

    Attributes:
        name: The input.
        shift: The largest difference of means of a channel, in standard deviations of its values.
        sure: Whether it is more than chance would do with so many samples.
        reason: What seems to be wrong, one sentence.
    """

    name: str
    shift: float
    sure: bool
    reason: str


def input_shift(name: str, then: InputStatistics, now: InputStatistics) -> InputShift:
    """Hold the values of an input against those of calibration."""
    if len(then.mean) != len(now.mean):
        reason = f"has {len(now.mean)} channels where calibration saw {len(then.mean)}"
        return InputShift(name, float("inf"), True, reason)
    shifts, z = _distance(then, now, list(range(len(now.mean))))
    shift = max(shifts)
    reason = _reason(then, now, shift, z)
    return InputShift(name, shift, z > _SURE, reason)


def _distance(
    then: InputStatistics, now: InputStatistics, order: list[int]
) -> tuple[list[float], float]:
    """Return shifts of the channels in this order, and how many standard errors the largest is.

    Channels are also held against each other: the brightness of images varies far more than the
    difference of their channels.
    """
    here = [now.mean[index] for index in order]
    scales = [max(a, b, 1e-12) for a, b in zip(then.std, now.std, strict=True)]
    shifts = [abs(a - b) / scale for a, b, scale in zip(here, then.mean, scales, strict=True)]
    count = len(order)
    contrasts = [np.eye(count)[i] for i in range(count)]
    contrasts += [np.eye(count)[i] - np.eye(count)[j] for i in range(count) for j in range(i)]
    gap = np.array(here) - np.array(then.mean)
    moved = np.array(now.spread)[np.ix_(order, order)]
    error = np.array(then.spread) / then.samples + moved / now.samples
    least = 1e-6 * float(np.square(scales).max())
    z = max(
        abs(float(c @ gap)) / sqrt(max(float(c @ error @ c), least / now.samples))
        for c in contrasts
    )
    return shifts, z


def _reason(then: InputStatistics, now: InputStatistics, shift: float, z: float) -> str:
    means = f"means {_listed(now.mean)}, {_listed(then.mean)} when it was calibrated"
    if z <= _SURE:
        return f"fits what was calibrated on: {means}"
    count = len(now.mean)
    if count > 2:
        _, reversed_z = _distance(then, now, list(range(count))[::-1])
        if reversed_z < _CLEARLY * z:
            return f"its channels seem to be in reverse order, BGR for RGB: {means}"
    ratio = max(now.std) / max(*then.std, 1e-12)
    if not 1 / _SCALED < ratio < _SCALED:
        return f"its values are spread {ratio:.3g} times as wide: {means}"
    return f"its means are {shift:.2g} standard deviations from those of calibration: {means}"


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Return where the channels of images are: first or last, behind the samples."""
    if len(shape) != 4:
        return None
    for axis in (1, 3):
        if 1 < shape[axis] <= _MOST_CHANNELS:
            return axis
    return None


def is_float_input(array: npt.NDArray[Any]) -> bool:
    """Whether an input has statistics."""
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def _rounded(values: npt.NDArray[np.float64]) -> list[float]:
    """Round to what is the same however sums are split among threads."""
    return [float(f"{value:.9g}") for value in values]


def _listed(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
