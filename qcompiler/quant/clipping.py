"""The search for the scale and zero point of least squared error, weighted or not.

Everything is measured in steps of the candidate's own scale: with x = value / scale and p the
rounded, saturated x (code minus zero point), the error of the candidate is scale² Σ(x - p)². For
these very codes the best scale is scale · Σxp / Σpp, which takes the error down to
Σvalue² - scale² (Σxp)² / Σpp. So candidates compare by the last term, their *gain*, and the winner
is replaced by its least-squares scale. In these units no sum overflows while the scale's type can
hold the scale, however large the values.

Weighted, an element of value v counts |v| + rms(group) times in every sum above: large weights,
which a plain search clips for the sake of many small ones, matter more to what a product computes
(llama.cpp's k-quants weigh like this). In steps of a scale these weights are |x| + rms / scale, so
that weighted errors and gains are in units of scale³.

Zero points stay those of the whole range: an exhaustive search over them too gains 0.03 to 0.18 dB
(2 to 4 bits, blocks of 32 to 128, Gaussian to Student-t and skewed groups) and costs
many times the time.

Floats of 8 bits have no best scale for given codes in this sense that would pay: their candidates
are compared by measured error, as those of 8-bit integers are.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.quant.arithmetic import round_scale
from qcompiler.quant.float_codes import round_e4m3
from qcompiler.quant.grouping import Array
from qcompiler.quant.packing import IntArray
from qcompiler.quant.scheme import QSpec
from qcompiler.quant.tiles import F32, F64, Strip, Tile, sum_rows

_RATIOS: dict[int, tuple[float, float, float]] = {
    8: (0.98, 0.9, 0.75),
    7: (0.98, 0.9, 0.75),
    4: (0.95, 0.82, 0.65),
    3: (0.9, 0.7, 0.5),
    2: (0.7, 0.5, 0.33),
}
"""Shares of the whole range tried first, by bits: they span the optimum of Gaussian, Laplace,
Student-t and uniform groups of 32 to 1024 elements; a parabola through their gains gives a fourth.
"""
_ASYMMETRIC_RATIOS = _RATIOS | {3: (0.95, 0.78, 0.57), 2: (0.95, 0.7, 0.48)}
"""The same with a zero point, where a few steps cover a range without a gap at its upper end."""
_WEIGHTED_RATIOS = {4: (1.0, 0.9, 0.78), 3: (1.0, 0.85, 0.68), 2: (1.0, 0.8, 0.6)}
"""The same for weighted errors, which clip less; they begin with the whole range."""
_SMALLEST_RATIO = 0.15

_LEAST_SQUARES = 1e-30
"""Below any sum of weighted squared codes but that of codes that are all 0."""
_MARGIN = 1 - 2**-9
"""A clip must beat min-max by more than the rounding of scales and of float32 sums can undo."""


_Bounds = tuple[int, int] | tuple[F32, F32]


@dataclass(frozen=True, slots=True)
class StripResult:
    """What was chosen for the groups of a strip.

    Attributes:
        scale: `[groups]`, the dtype asked for.
        zero: `[groups]` zero points, whole numbers.
        squared_error: Sum over the strip, never weighted.
        squared_signal: Sum over the strip, never weighted.
    """

    scale: Array
    zero: F32
    squared_error: float
    squared_signal: float


@dataclass(frozen=True, slots=True)
class _Grid:
    """Scales and zero points of the groups of a strip: float32 `[groups]` each."""

    scale: F32
    zero: F32


class _Best:
    """The grids of largest gain seen so far, per group.

    Attributes:
        grid: The grids, replaced in place.
    """

    def __init__(self, grid: _Grid, gain: F64) -> None:
        self.grid = _Grid(grid.scale.copy(), grid.zero.copy())
        self._gain = gain.copy()

    def offer(self, grid: _Grid, gain: F64) -> None:
        """Keep `grid` for the groups where its gain is larger."""
        better = gain > self._gain
        np.copyto(self.grid.scale, grid.scale, where=better)
        np.copyto(self.grid.zero, grid.zero, where=better)
        np.copyto(self._gain, gain, where=better)


class GridSearch:
    """Chooses and applies the grids of one tensor.

    Attributes:
        middle: Zero point of symmetric grids.
    """

    def __init__(
        self, spec: QSpec, scale_dtype: np.dtype[Any], *, clip: bool, weighted: bool = False
    ) -> None:
        """Prepare a search.

        Args:
            spec: Integer type and symmetry.
            scale_dtype: The type scales are rounded to.
            clip: Whether to search below the whole range.
            weighted: Whether large values count more; at 7 and 8 bits they never do, since
                hardly anything is clipped there.
        """
        self._weighted = weighted and spec.qtype.bits < 7
        self._scale_dtype = scale_dtype
        self._clip = clip
        self._symmetric = spec.symmetric
        self._bits = spec.qtype.bits
        ratios = _RATIOS if spec.symmetric else _ASYMMETRIC_RATIOS
        self._ratios = (_WEIGHTED_RATIOS if self._weighted else ratios)[self._bits]
        self._qmin, self._qmax = spec.qtype.qmin, spec.qtype.qmax
        self._floating = spec.qtype.floating
        self.middle = (self._qmin + self._qmax + 1) // 2

    def quantize_strip(self, strip: Strip, codes: IntArray) -> StripResult:
        """Choose the grid of each group of `strip` and write its codes into their section.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        base, signal = self._whole_range(*_extremes(strip)), np.zeros(strip.count)
        if not self._clip:
            return self._result(base, self._write(strip, base, codes, signal), signal)
        if self._weighted:
            return self._quantize_weighted(strip, base, codes)
        base_error = self._write(strip, base, None, signal)
        if self._bits < 7:
            # What a candidate has to gain to be worth more than min-max.
            grid = self._search(strip, base, signal - base_error * _MARGIN, None)
        else:
            grid = self._search_measured(strip, base, -base_error * _MARGIN)
        error = self._write(strip, grid, codes)
        worse = _worse(grid, base, error, base_error)
        if worse.any():
            grid = _where(worse, base, grid)
            error = self._write(strip, grid, codes)
        return self._result(grid, error, signal)

    def _quantize_weighted(self, strip: Strip, base: _Grid, codes: IntArray) -> StripResult:
        """Do the same by weighted error.

        The whole range is one of the candidates, and rounding again with a least-squares scale
        only lowers an error, so that but for the rounding of scales nothing is worse than it.
        """
        grid = self._search(strip, base, np.zeros(strip.count), _root_mean_square(strip, base))
        signal = np.zeros(strip.count)
        return self._result(grid, self._write(strip, grid, codes, signal), signal)

    def _result(self, grid: _Grid, error: F64, signal: F64) -> StripResult:
        return StripResult(
            grid.scale.astype(self._scale_dtype),
            grid.zero,
            float(np.add.accumulate(error)[-1]),
            float(np.add.accumulate(signal)[-1]),
        )

    def _whole_range(self, low: F64, high: F64) -> _Grid:
        """Return the grid that just holds `low..high`."""
        if self._symmetric:
            down, up = self._qmin - self.middle, self._qmax - self.middle
            stored = self._stored(np.maximum(np.maximum(high / up, low / down), 0))
            return _Grid(stored, np.full_like(stored, self.middle))
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        stored = self._stored((high - low) / (self._qmax - self._qmin))
        zero = np.clip(np.rint(self._qmin - low / stored), self._qmin, self._qmax)
        return _Grid(stored, zero.astype(np.float32))

    def _stored(self, scale: F64 | F32) -> F32:
        """Round scales to the type that stores them, as float32."""
        return round_scale(scale, self._scale_dtype).astype(np.float32)

    def _search(self, strip: Strip, base: _Grid, base_gain: F64, rms: F64 | None) -> _Grid:
        """Return the best grid of a few candidates, its scale as the file will hold it.

        Args:
            strip: The values.
            base: The whole range.
            base_gain: What it gains, weighted if `rms` is given.
            rms: Root mean square of each group, for weighted gains.
        """
        best = _Best(base, base_gain)
        ratios = self._ratios
        gains = []
        for ratio in ratios:
            fitted, gain = self._fit(strip, _Grid(base.scale * np.float32(ratio), base.zero), rms)
            best.offer(fitted, gain)
            gains.append(gain)
        summit = _summit(ratios, gains)
        best.offer(*self._fit(strip, _Grid(base.scale * summit, base.zero), rms))
        if self._bits < 4:
            best.offer(*self._fit(strip, best.grid, rms))
        return _Grid(self._stored(best.grid.scale), best.grid.zero)

    def _search_measured(self, strip: Strip, base: _Grid, base_gain: F64) -> _Grid:
        """Do the same by measured error: at 7 and 8 bits it is lost in the rounding of gains."""
        best = _Best(base, base_gain)
        ratios = self._ratios
        gains = []
        for ratio in ratios:
            grid = _Grid(self._stored(base.scale * np.float32(ratio)), base.zero)
            gains.append(-self._write(strip, grid, None))
            best.offer(grid, gains[-1])
        grid = _Grid(self._stored(base.scale * _summit(ratios, gains)), base.zero)
        best.offer(grid, -self._write(strip, grid, None))
        return best.grid

    def _fit(self, strip: Strip, grid: _Grid, rms: F64 | None) -> tuple[_Grid, F64]:
        """Return the grid of least error for the codes that `grid` gives, and its gain."""
        products, squares = np.zeros(strip.count), np.zeros(strip.count)
        inverse = strip.per_group(0, np.float32(1) / grid.scale)
        floor = self._floor(strip, grid, rms)
        bounds = self._bounds(strip, grid)
        for tile in strip.tiles():
            np.multiply(tile.values, inverse, out=tile.quotient)
            self._round(tile, bounds)
            weighted = tile.rounded
            if floor is not None:
                weighted = tile.importance
                np.abs(tile.quotient, out=weighted)
                np.add(weighted, floor, out=weighted)
                np.multiply(weighted, tile.rounded, out=weighted)
            np.multiply(tile.quotient, weighted, out=tile.quotient)
            products += sum_rows(tile.quotient)
            np.multiply(tile.rounded, weighted, out=tile.rounded)
            squares += sum_rows(tile.rounded)
        # A group all of whose codes are 0 has no best scale: a gain of 0 keeps it from winning.
        scale = grid.scale * (products / np.maximum(squares, _LEAST_SQUARES))
        unit = grid.scale if rms is None else np.square(grid.scale, dtype=np.float64)
        return _Grid(scale.astype(np.float32), grid.zero), scale * products * unit

    def _floor(self, strip: Strip, grid: _Grid, rms: F64 | None) -> F32 | None:
        """Return what every element counts at least, in steps of the grid; None if not weighted."""
        if rms is None:
            return None
        return strip.per_group(4, (rms / grid.scale).astype(np.float32))

    def _write(
        self, strip: Strip, grid: _Grid, codes: IntArray | None, signal: F64 | None = None
    ) -> F64:
        """Round as QuantizeLinear does, write any codes, return the squared error of each group.

        Args:
            strip: The values.
            grid: Scales and zero points.
            codes: Section of codes to write to, or None to only measure.
            signal: Zeros `[groups]`, to become the squared signal of each group, or None.
        """
        error = np.zeros(strip.count)
        scale, zero = strip.per_group(0, grid.scale), strip.per_group(3, grid.zero)
        bounds = self._bounds(strip, grid)
        for tile in strip.tiles():
            np.divide(tile.values, scale, out=tile.quotient)
            self._round(tile, bounds)
            if codes is not None:
                self._store(tile, zero, codes)
            np.subtract(tile.quotient, tile.rounded, out=tile.rounded)
            np.multiply(tile.rounded, tile.rounded, out=tile.rounded)
            error += sum_rows(tile.rounded)
            if signal is not None:
                np.multiply(tile.quotient, tile.quotient, out=tile.quotient)
                signal += sum_rows(tile.quotient)
        area = np.square(grid.scale, dtype=np.float64)
        if signal is not None:
            signal *= area
        return error * area

    def _store(self, tile: Tile, zero: F32, codes: IntArray) -> None:
        """Write the codes of a tile, which holds whole steps from zero before and after."""
        if self._symmetric and self.middle == 0:
            tile.store(codes)
            return
        np.add(tile.rounded, zero, out=tile.rounded)
        tile.store(codes)
        np.subtract(tile.rounded, zero, out=tile.rounded)

    def _bounds(self, strip: Strip, grid: _Grid) -> _Bounds:
        """Return the smallest and largest step from zero: two numbers, or two per group."""
        if self._symmetric:
            return self._qmin - self.middle, self._qmax - self.middle
        return (
            strip.per_group(1, self._qmin - grid.zero),
            strip.per_group(2, self._qmax - grid.zero),
        )

    def _round(self, tile: Tile, bounds: _Bounds) -> None:
        """Round and saturate the quotient to codes less the zero point."""
        rounded = tile.rounded
        low, high = bounds
        if self._floating:
            np.clip(tile.quotient, low, high, out=rounded)
            round_e4m3(rounded, rounded)
            return
        np.rint(tile.quotient, out=rounded)
        if isinstance(low, int):
            np.clip(rounded, low, high, out=rounded)
            return
        # np.clip has no vectorized loop for bounds that are arrays.
        np.maximum(rounded, low, out=rounded)
        np.minimum(rounded, high, out=rounded)


def _extremes(strip: Strip) -> tuple[F64, F64]:
    """Return the smallest and largest value of each group.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    low, high = np.full(strip.count, np.inf), np.full(strip.count, -np.inf)
    for tile in strip.tiles():
        np.minimum(low, np.minimum.reduce(tile.values, axis=0), out=low)
        np.maximum(high, np.maximum.reduce(tile.values, axis=0), out=high)
    if not (np.isfinite(low) & np.isfinite(high)).all():
        message = "values hold NaN or infinity"
        raise ValueError(message)
    return low, high


def _root_mean_square(strip: Strip, base: _Grid) -> F64:
    """Return the root mean square of each group, summed in steps of the whole range's grid."""
    total, rows = np.zeros(strip.count), 0
    inverse = strip.per_group(0, np.float32(1) / base.scale)
    for tile in strip.tiles():
        np.multiply(tile.values, inverse, out=tile.quotient)
        np.multiply(tile.quotient, tile.quotient, out=tile.quotient)
        total += sum_rows(tile.quotient)
        rows += len(tile.values)
    return np.sqrt(total / rows) * base.scale


def _worse(grid: _Grid, base: _Grid, error: F64, base_error: F64) -> npt.NDArray[np.bool_]:
    """Return where a grid is no better than the whole range, and another grid."""
    worse: npt.NDArray[np.bool_] = error > base_error * (1 - 2**-12)
    worse &= (grid.scale != base.scale) | (grid.zero != base.zero)
    return worse


def _summit(ratios: tuple[float, float, float], gains: list[F64]) -> F32:
    """Return where a parabola through three gains is highest, per group.

    Where it opens upwards the better end is taken.
    """
    first, second, third = ratios
    rise = (gains[1] - gains[0]) / (second - first)
    fall = (gains[2] - gains[1]) / (third - second)
    bend = (fall - rise) / (third - first)
    peaked = bend < 0
    vertex = (first + second) / 2 - rise / np.where(peaked, 2 * bend, 1)
    end = np.where(gains[0] > gains[2], first, third)
    return np.clip(np.where(peaked, vertex, end), _SMALLEST_RATIO, 1).astype(np.float32)


def _where(condition: npt.NDArray[np.bool_], one: _Grid, other: _Grid) -> _Grid:
    return _Grid(
        np.where(condition, one.scale, other.scale), np.where(condition, one.zero, other.zero)
    )
