"""What is known of a model's activations after it ran on samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.histogram import CHUNK, F64, Histogram, HistogramBuilder, chunks_of
from qcompiler.errors import UsageError
from qcompiler.quant.selector import nearest

Array = npt.NDArray[Any]

_COLLECT_AGAIN: Final = "collect the statistics again, without the file"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of one value of the main graph.

    Attributes:
        name: The value.
        histogram: Whether a histogram is; then the values leave the runtime.
        channel_axis: Axis along which smallest and largest values are kept apart, or None.
    """

    name: str
    histogram: bool = False
    channel_axis: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TensorStatistics:
    """What one value held over all calls, as float32.

    Attributes:
        count: Number of elements; 0 makes all numbers 0.0.
        minimum: Smallest value.
        maximum: Largest value.
        total: Sum of all values. Without a histogram the runtime added up each call in float32.
        total_squares: Sum of their squares; as above, and infinite where that overflowed.
        histogram: None unless it was wanted.
        channel_minimum: float64 `[channels]`, the smallest value of each channel, or None.
        channel_maximum: float64 `[channels]`, the largest value of each channel, or None.
    """

    count: int
    minimum: float
    maximum: float
    total: float
    total_squares: float
    histogram: Histogram | None = None
    channel_minimum: F64 | None = None
    channel_maximum: F64 | None = None

    @property
    def mean(self) -> float:
        """Mean of all values, 0.0 when there is none."""
        return self.total / self.count if self.count else 0.0

    @property
    def rms(self) -> float:
        """Root of the mean square, 0.0 when there is no value."""
        return float(np.sqrt(self.total_squares / self.count)) if self.count else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Statistics of the wanted values, and what they were collected from.

    Attributes:
        tensors: By value name, in the order of the names.
        model_fingerprint: Of the model they belong to.
        samples_fingerprint: Of the samples it ran on.
        calls: How many samples those were.
    """

    tensors: Mapping[str, TensorStatistics]
    model_fingerprint: str
    samples_fingerprint: str
    calls: int

    def require(self, wanted: Sequence[Wanted], where: str | None = None) -> None:
        """Check that everything wanted is here.

        Args:
            wanted: What a compilation needs.
            where: The file, for the message.

        Raises:
            UsageError: A value, its histogram or its channels are missing; it is named.
        """
        for want in wanted:
            found = self.tensors.get(want.name)
            if found is None:
                close = ", ".join(nearest(want.name, list(self.tensors)))
                message = f"has no statistics of {want.name}; nearest: {close or 'none'}"
            elif want.histogram and found.histogram is None:
                message = (
                    f"has only the extremes of {want.name}, and the observer needs a histogram"
                )
            elif want.channel_axis is not None and found.channel_minimum is None:
                message = f"has no extremes per channel of {want.name}"
            else:
                continue
            raise UsageError(message, where=where, hint=_COLLECT_AGAIN)


@dataclass(frozen=True, slots=True, eq=False)
class CallExtremes:
    """What the runtime reduced one call's values to.

    Attributes:
        count: Number of elements.
        minimum: Smallest value.
        maximum: Largest value.
        total: Sum; NaN if a value is.
        total_squares: Sum of squares.
        channel_minimum: `[channels]`, or None.
        channel_maximum: `[channels]`, or None.
    """

    count: int
    minimum: float
    maximum: float
    total: float
    total_squares: float
    channel_minimum: Array | None = None
    channel_maximum: Array | None = None


class TensorAccumulator:
    """Gathers the statistics of one value, call by call."""

    def __init__(self, *, histogram: bool, channel_axis: int | None) -> None:
        self._builder = HistogramBuilder() if histogram else None
        self._axis = channel_axis
        self._count = 0
        self._low, self._high = np.inf, -np.inf
        self._total = self._squares = 0.0
        self._channels: tuple[F64, F64] | None = None

    def add_values(self, values: Array) -> None:
        """Add one call's float values, any shape.

        Raises:
            ValueError: A value is NaN or infinite, there is no such channel axis, or its size
                differs from an earlier call's.
        """
        if not values.size:
            return
        scratch = np.empty(min(CHUNK, values.size))
        for chunk in chunks_of(values):
            if self._builder is not None:
                self._builder.add_chunk(chunk)
            wide = scratch[: len(chunk)]
            wide[...] = chunk
            self._total += float(np.add.reduce(wide))
            np.multiply(wide, wide, out=wide)
            self._squares += float(np.add.reduce(wide))
        channels = (None, None) if self._axis is None else _per_channel(values, self._axis)
        if self._builder is None:
            self._widen(float(values.min()), float(values.max()), *channels)
        else:
            self._widen(*self._builder.extremes, *channels)
        self._count += values.size

    def add_extremes(self, call: CallExtremes) -> None:
        """Add what the runtime made of one call.

        Raises:
            ValueError: A value is NaN or infinite, or the number of channels differs from an
                earlier call's.
        """
        if not call.count:
            return
        # A runtime may skip a NaN when it looks for extremes; a sum never does.
        if np.isnan(call.total):
            message = "values are NaN or infinite"
            raise ValueError(message)
        self._widen(call.minimum, call.maximum, call.channel_minimum, call.channel_maximum)
        self._count += call.count
        self._total += call.total
        self._squares += call.total_squares

    def finish(self) -> TensorStatistics:
        """Return what was gathered."""
        low, high = (self._low, self._high) if self._count else (0.0, 0.0)
        channels = self._channels or (None, None)
        histogram = None if self._builder is None else self._builder.finish()
        return TensorStatistics(
            self._count, low, high, self._total, self._squares, histogram, *channels
        )

    def _widen(self, low: float, high: float, lows: Array | None, highs: Array | None) -> None:
        if not (np.isfinite(low) and np.isfinite(high)):
            message = "values are NaN or infinite"
            raise ValueError(message)
        # Adding 0.0 takes the sign off zeros: which of two zeros comes first is chance.
        self._low, self._high = min(self._low, low) + 0.0, max(self._high, high) + 0.0
        if lows is None or highs is None:
            return
        lows, highs = lows.astype(np.float64) + 0.0, highs.astype(np.float64) + 0.0
        if self._channels is not None:
            if self._channels[0].shape != lows.shape:
                message = f"there are {lows.size} channels, and {self._channels[0].size} before"
                raise ValueError(message)
            lows = np.minimum(lows, self._channels[0])
            highs = np.maximum(highs, self._channels[1])
        self._channels = (lows, highs)


def _per_channel(values: Array, axis: int) -> tuple[Array, Array]:
    if not -values.ndim <= axis < values.ndim:
        message = f"there is no axis {axis} in shape {list(values.shape)}"
        raise ValueError(message)
    others = tuple(index for index in range(values.ndim) if index != axis % values.ndim)
    return values.min(axis=others), values.max(axis=others)
