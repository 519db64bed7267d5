"""What quantizing a product of data and weights would cost, on examples of the data."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.coarseness import median_magnitude
from qcompiler.calibration.linear_examples import (
    ChannelRanges,
    Examples,
    channels_of_rows,
    weight_matrix,
)
from qcompiler.calibration.outliers import outlier_channels
from qcompiler.ir.channels.scaling import constant_now, per_position
from qcompiler.ir.dataflow import int_attribute
from qcompiler.ir.provenance import QUANTIZED_INPUTS, scheme_of
from qcompiler.ir.quantizable import Site, planned_spec
from qcompiler.ir.weights import read_all
from qcompiler.quant.arithmetic import dequantize
from qcompiler.quant.float_codes import round_e4m3
from qcompiler.quant.granularity import PerTensor
from qcompiler.quant.qtype import FP8
from qcompiler.quant.ranges import RangeMethod, quantize_tensor
from qcompiler.quant.scheme import Activations

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

_SHARES: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Parts of the whole range that the range of an activation is looked for among."""
_ROW_STEP: Final = 4
"""The range is looked for on one example in so many."""
_OUTPUTS: Final = 256
"""Output channels of a weight that are looked at."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Energy of an error over that of the exact product.

    Attributes:
        fit: On the examples of the calls that the range of the data is taken from.
        judge: On the others, which may exceed it.
    """

    fit: float
    judge: float


class QuantizedProduct:
    """One op with a weight, whose quantization is tried with different scales of its data.

    Args:
        site: The op, with the scheme it is planned to have.
        channels: Channel of each input channel, as in `ir.channels.groups.Reader`.
        examples: What it multiplies.
        outlier_limit: How many channels may stay in float at most; 0 is none.
        two_terms_below: Data whose median is fewer steps large gets two terms of codes.
    """

    def __init__(
        self,
        site: Site,
        channels: Ids,
        examples: Examples,
        outlier_limit: int,
        two_terms_below: float = 0.0,
    ) -> None:
        self._site = site
        self._channels = channels
        self._examples = examples
        self._rows_of = channels_of_rows(site, channels)
        scheme = scheme_of(site.node)
        self._activations = Activations.FLOAT if scheme is None else scheme.activations
        self._steps = 255 if scheme is None else (1 << scheme.activation_bits) - 1
        self._floating = scheme is not None and scheme.floating
        if self._activations is Activations.STATIC:
            placed = QUANTIZED_INPUTS in site.node.metadata_props
            self._activations = Activations.STATIC if placed else Activations.FLOAT
        split = self._may_split() and not self._floating
        self._outliers = outlier_limit if split else 0
        self._two_terms_below = two_terms_below if split else 0.0
        weight = constant_now(site.node, site.weight_input, site.weight).const_value
        assert weight is not None
        whole = np.asarray(read_all(weight), np.float32)
        matrix = self._matrix(whole)
        self._extremes = matrix.min(axis=2), matrix.max(axis=2)
        self._weight = some_outputs(site, whole)
        self._exact = examples.rows @ self._matrix(self._weight)

    @property
    def quantizes_data(self) -> bool:
        """Whether the data is rounded too."""
        return self._activations is not Activations.FLOAT

    def weight_extremes(self, count: int) -> tuple[F64, F64]:
        """Return smallest and largest weight of each of `count` channels; 0 where there is none."""
        low, high = np.zeros(count), np.zeros(count)
        rows = self._rows_of
        held = rows >= 0
        np.minimum.at(low, rows[held], self._extremes[0][held])
        np.maximum.at(high, rows[held], self._extremes[1][held])
        return low, high

    @property
    def treatment(self) -> tuple[int, Activations, int, int, bool]:
        """What decides the data that is multiplied: ops that agree in it share `data`."""
        shared = id(self._examples)
        return shared, self._activations, self._outliers, self._steps, self._floating

    def data(self, scales: F64) -> F32:
        """Return the examples divided by `scales`, rounded where the data is going to be."""
        by_row = per_position(self._rows_of, scales)[:, np.newaxis, :]
        rows = (self._examples.rows / by_row).astype(np.float32)
        return self._rounded(rows, scales) if self.quantizes_data else rows

    def noise(self, rows: F32, scales: F64) -> Noise:
        """Return the noise of the product of `data(scales)` and the rounded weight."""
        error = rows @ self._matrix(self._rounded_weight(scales)) - self._exact
        split = self._examples.split
        return Noise(
            *(
                noise_ratio(error[:, part], self._exact[:, part])
                for part in (slice(split), slice(split, None))
            )
        )

    def _rounded_weight(self, scales: F64) -> F32:
        spec = planned_spec(self._site)
        shape = [1] * self._weight.ndim
        if self._site.row.op_type in ("Conv", "ConvTranspose"):
            factors = self._convolution_factors(scales)
        else:
            shape[self._site.axes.reduction] = -1
            factors = per_position(self._channels, scales).reshape(shape)
        scaled = (self._weight * factors).astype(self._site.tensor.dtype.numpy())
        if spec is None:
            return scaled.astype(np.float32)
        found = quantize_tensor(scaled, spec, RangeMethod.MIN_MAX, scaled.dtype)
        restored = dequantize(found.codes, found.scale, found.zero_point, spec.granularity)
        return np.asarray(restored, np.float32)

    def _convolution_factors(self, scales: F64) -> F64:
        """Shape the scales so that they multiply the weight of a convolution."""
        by_row = per_position(self._rows_of, scales)
        groups, width = by_row.shape
        shape = self._weight.shape
        if self._site.row.op_type == "ConvTranspose":
            return by_row.reshape(-1, *[1] * (len(shape) - 1))
        wide = np.broadcast_to(by_row[:, np.newaxis], (groups, shape[0] // groups, width))
        return wide.reshape(shape)

    def _matrix(self, weight: Array) -> F32:
        return weight_matrix(self._site, weight)

    def _rounded(self, rows: F32, scales: F64) -> F32:
        """Round data to its codes as calibration would, its outlier channels left alone."""
        steps = self._steps
        ranges = self._examples.first_ranges
        factors = per_position(self._channels, scales)
        low, high = ranges.minimum / factors, ranges.maximum / factors
        if self._activations is Activations.DYNAMIC:
            return _on_grid(rows, float(rows.min()), float(rows.max()), steps)
        kept = np.zeros(len(low), np.bool_)
        kept[list(outlier_channels(low, high, self._outliers))] = True
        inner = ~kept if self._outliers else np.ones(rows.shape[-1], np.bool_)
        whole = float(low[~kept].min()), float(high[~kept].max())
        some = rows[:, ::_ROW_STEP, inner]
        if self._floating:
            return _on_floats(rows, max(whole[1], -whole[0]))
        step = (max(whole[1], 0.0) - min(whole[0], 0.0)) / steps
        if median_magnitude(some) < self._two_terms_below * step:
            return _in_two_terms(rows, float(low.min()), float(high.max()), steps)
        ends = [(share * whole[0], share * whole[1]) for share in _SHARES]
        errors = [_on_grid(some, *end, steps) - some for end in ends]
        nearest = int(np.argmin([float(np.square(error).sum()) for error in errors]))
        best = _on_grid(rows, *ends[nearest], steps)
        return np.where(inner, best, rows) if self._outliers else best

    def _may_split(self) -> bool:
        """Whether a part of the product may be computed apart from the rest."""
        return self._site.row.op_type in ("MatMul", "Gemm") and not self._site.left


def channel_extremes(channels: Ids, ranges: ChannelRanges, count: int) -> tuple[F64, F64, F64]:
    """Return smallest and largest value and largest mean magnitude of each channel of a group."""
    low, high, mean = np.zeros(count), np.zeros(count), np.zeros(count)
    held = channels >= 0
    np.minimum.at(low, channels[held], ranges.minimum[held])
    np.maximum.at(high, channels[held], ranges.maximum[held])
    np.maximum.at(mean, channels[held], ranges.mean_magnitude[held])
    return low, high, mean


def _on_grid(rows: F32, low: float, high: float, steps: int) -> F32:
    """Round to the nearest of `steps + 1` numbers from `low` to `high`, one of which is 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / steps
    if step <= 0.0:
        return rows
    first = np.rint(low / step)
    return np.asarray(np.clip(np.rint(rows / step), first, first + steps) * step, np.float32)


def _on_floats(rows: F32, largest: float) -> F32:
    """Round to the E4M3 numbers of which the largest stands for `largest`."""
    scale = np.float32(largest / FP8.qmax)
    if scale <= 0.0:
        return rows
    codes = np.clip(rows / scale, FP8.qmin, FP8.qmax)
    round_e4m3(codes, codes)
    return np.asarray(codes * scale, np.float32)


def _in_two_terms(rows: F32, low: float, high: float, steps: int) -> F32:
    """Round as `expand-residuals` does: what a step leaves out is there, what is clipped is not."""
    codes = _on_grid(rows, low, high, steps)
    half = (max(high, 0.0) - min(low, 0.0)) / steps / 2
    return codes + _on_grid(rows - codes, -half, half, steps)


def some_outputs(site: Site, weight: F32) -> F32:
    """Return a weight with some of its output channels, where each has scales of its own."""
    axis = site.axes.output
    grouped = int_attribute(site.node, "group", 1) > 1
    spec = planned_spec(site)
    alone = spec is None or not isinstance(spec.granularity, PerTensor)
    if axis is None or grouped or not alone or weight.shape[axis] <= _OUTPUTS:
        return weight
    chosen = np.linspace(0, weight.shape[axis] - 1, _OUTPUTS).astype(np.int64)
    return np.ascontiguousarray(weight.take(chosen, axis=axis))


def noise_ratio(error: F32, exact: F32) -> float:
    """Return the mean over examples of the energy of the error over that of the product.

    Every example counts, however large: on some tokens of language models values are a thousand
    times as large as on the others, and would decide alone. Half of the typical energy is added to
    that of an example, so that those where next to nothing is computed do not decide either.
    """
    signals = np.square(exact, dtype=np.float64).sum(axis=(0, 2))
    noises = np.square(error, dtype=np.float64).sum(axis=(0, 2))
    typical = float(np.median(signals)) if signals.size else 0.0
    held = signals + typical > 0.0
    return float(np.mean(2 * noises[held] / (signals[held] + typical))) if np.any(held) else 0.0
