"""Choosing the codes of one weight from the Hessian of its output error."""

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.execution.torch.element_types import STORAGE
from qcompiler.ir.weights import read_all
from qcompiler.quant.granularity import PerTensor
from qcompiler.reconstruction.compensation import (
    ColumnGrid,
    Factor,
    Fit,
    factorize,
    fit_all,
    importance,
    round_columns,
)
from qcompiler.reconstruction.hessians import output_error
from qcompiler.reconstruction.scale_search import ScaleSearch
from qcompiler.reconstruction.starting_point import CodedWeight

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

_PIECE: Final = 1 << 22
"""Elements of a weight that are rounded at once on the CPU: 16 MiB in float32, a few times."""
_PIECE_ELSEWHERE: Final = 1 << 27
"""The same on other devices, where starting a kernel costs more than memory does."""


@dataclass(frozen=True, slots=True)
class RoundingSettings:
    """How weights are rounded.

    Attributes:
        damping: Part of the mean of a Hessian's diagonal that is added to it.
        act_order: Whether columns are rounded in the order of falling second moments of the data.
            Scales are then chosen before the first column is rounded.
        static_scales: Whether scales stay what they are. Otherwise each is chosen anew, from the
            compensated weight, when its first column comes up; not at 8 bits, and not where pairs
            of codes are limited.
        chunk: Columns after which errors are carried on; changes speed only.
    """

    damping: float = 0.01
    act_order: bool = False
    static_scales: bool = False
    chunk: int = 128


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """New codes of a weight.

    Attributes:
        codes: int8 or uint8, of the weight's shape.
        scale: Of the weight's float type and the shape that its scales had.
        zero_point: Of the codes' type, None where there were none.
        values: What the codes stand for, of the weight's shape, float32; at kept elements the
            float that is left there.
        error_before: Squared error of the op's output over all samples with the start codes.
        error_after: The same now, at most `error_before`.
        signal: Squared output of the op over all samples.
        squared_error: Sum of squared differences between the weight and `values`.
        squared_signal: Sum of squares of the weight.
        changed: Rows that have new codes; the others keep theirs, which were better.
        damping: What the Hessian was damped with.
        importance: float32 `[groups, K]`, what the squared rounding error of an input channel
            costs once it was made up for.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    values: Array
    error_before: float
    error_after: float
    signal: float
    squared_error: float
    squared_signal: float
    changed: int
    damping: float
    importance: Array


class SharedHessian:
    """The Hessian of one weight or several, factored once.

    Attributes:
        matrix: `[groups, K, K]`, on the device to compute on.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._factored: dict[tuple[float, bool], tuple[list[int] | None, Factor]] = {}

    def factored(self, settings: RoundingSettings) -> tuple[list[int] | None, Factor]:
        """Return the order that columns are rounded in, None for their own, and the factor."""
        key = (settings.damping, settings.act_order)
        if key not in self._factored:
            order = _falling(self.matrix) if settings.act_order else None
            arranged = self.matrix if order is None else self.matrix[:, order][:, :, order]
            self._factored[key] = order, factorize(arranged, settings.damping)
        return self._factored[key]


def round_weight(
    weight: CodedWeight,
    hessian: SharedHessian,
    settings: RoundingSettings,
    mask: Mask | None = None,
) -> Rounded:
    """Round a weight so that the output of its ops changes little.

    Of every row, which is an output channel, the new codes are taken only if their output error
    is below that of the codes it has.

    Args:
        weight: The weight, with start codes.
        hessian: Of the squared error of its ops' outputs.
        settings: How.
        mask: Elements that stay in float, of the weight's shape. Scales are chosen without them;
            they take up the errors of others, and their codes stand for 0.

    Raises:
        ModelError: The Hessian holds NaN or infinity.
    """
    work = _Rows.read(weight, mask)
    hessian = _without_zero_columns(hessian, work.weight)
    order, factor = hessian.factored(settings)
    matrix = hessian.matrix.to(torch.float32)
    rounding = _Rounding(weight, matrix, factor, order, settings)
    piece = _PIECE if matrix.device.type == "cpu" else _PIECE_ELSEWHERE
    step = max(1, piece // max(1, weight.rows.width))
    if weight.rows.groups > 1:
        step = weight.rows.count  # weights of grouped convolutions are small
    totals = np.zeros(4)
    for start in range(0, weight.rows.count, step):
        totals += rounding.round(work.part(slice(start, start + step)))
    counts: Array = importance(factor, order).cpu().numpy()
    return work.result(weight, totals, factor.damping, counts)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """A weight and what stands for it, as rows; the last four are written to.

    Attributes:
        weight: `[rows, K]`, in its own float type.
        kept: Bool `[rows, K]`, None where everything is rounded.
        codes: int16 `[rows, K]`.
        scale: float32 `[rows, S]`.
        zero: float32 `[rows, S]`.
        values: float32 `[rows, K]`.
    """

    weight: Array
    kept: Array | None
    codes: Array
    scale: Array
    zero: Array
    values: Array

    @classmethod
    def read(cls, weight: CodedWeight, mask: Mask | None) -> Self:
        """Read a weight and its start codes."""
        rows = weight.rows
        scale = rows.scale_rows(_read(weight.scale)).astype(np.float32)
        zero = np.zeros_like(scale)
        if weight.zero_point is not None:
            zero = rows.scale_rows(_read(weight.zero_point).astype(np.float32))
        codes = np.ascontiguousarray(rows.rows(_read(weight.codes).astype(np.int16)))
        values = np.empty(codes.shape, np.float32)
        kept = None if mask is None or not mask.any() else rows.rows(mask)
        return cls(rows.rows(read_all(weight.tensor)), kept, codes, scale, zero, values)

    def part(self, rows: slice) -> "_Rows":
        """Return a view of some rows."""
        kept = None if self.kept is None else self.kept[rows]
        parts = (self.codes[rows], self.scale[rows], self.zero[rows], self.values[rows])
        return _Rows(self.weight[rows], kept, *parts)

    def result(
        self, weight: CodedWeight, totals: npt.NDArray[Any], damping: float, counts: Array
    ) -> Rounded:
        """Put everything back into the weight's shape."""
        rows, scale_type = weight.rows, weight.tensor.dtype.numpy()
        code_type = np.int8 if weight.spec.qtype.signed else np.uint8
        zero = None
        if weight.zero_point is not None:
            zero = rows.restored_scale(self.zero.astype(code_type))
        difference = self.values - self.weight.astype(np.float32)
        return Rounded(
            rows.restored(self.codes.astype(code_type)),
            rows.restored_scale(self.scale).astype(scale_type),
            zero,
            # What DequantizeLinear returns is rounded to the type of the scale.
            rows.restored(self.values.astype(scale_type).astype(np.float32)),
            float(totals[0]),
            float(totals[1]),
            float(totals[2]),
            float(np.square(difference, dtype=np.float64).sum()),
            float(np.square(self.weight, dtype=np.float64).sum()),
            int(totals[3]),
            damping,
            counts,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Rounding:
    """How the rows of one weight are rounded, whichever of them."""

    weight: CodedWeight
    hessian: Tensor
    factor: Factor
    order: list[int] | None
    settings: RoundingSettings

    def round(self, rows: _Rows) -> npt.NDArray[Any]:
        """Round some rows in place; return error before, error after, signal and rows changed."""
        exact = self._columns(rows.weight)
        kept = None if rows.kept is None else self._columns(rows.kept, torch.bool)
        grid = self._grid(rows)
        index = torch.tensor(grid.index, device=exact.device)
        old, zero = self._columns(rows.codes), grid.zero[:, index]
        old = old if kept is None else torch.where(kept, zero, old)
        values = (old - zero) * grid.scale[:, index]
        values = values if kept is None else torch.where(kept, exact, values)
        before = output_error(self.hessian, exact - values)
        start_scale, start_zero = grid.scale.clone(), grid.zero.clone()
        found = exact.clone()
        codes = self._round_columns(found, grid, kept)
        after = output_error(self.hessian, exact - found)
        better = after < before
        choose = better[:, None]
        rows.codes[...] = self._rows(torch.where(choose, codes, old.to(torch.int16)))
        rows.scale[...] = self._rows(torch.where(choose, grid.scale, start_scale))
        rows.zero[...] = self._rows(torch.where(choose, grid.zero, start_zero))
        rows.values[...] = self._rows(torch.where(choose, found, values))
        numbers = (
            before.double().sum(),
            torch.where(better, after, before).double().sum(),
            output_error(self.hessian, exact).double().sum(),
            better.sum(),
        )
        return np.array([float(each) for each in numbers])

    def _round_columns(self, values: Tensor, grid: ColumnGrid, kept: Tensor | None) -> Tensor:
        settings, spec = self.settings, self.weight.spec
        fit: Fit | None = None
        # At 8 bits hardly anything is clipped, and a coarse search finds no better scale.
        static = settings.static_scales or spec.qtype.bits == 8
        shared = isinstance(spec.granularity, PerTensor)
        if spec.pairs is None and not shared and (not static or kept is not None):
            fit = ScaleSearch(spec, STORAGE[self.weight.tensor.dtype])
        if fit is not None and (static or self.order is not None):
            fit_all(values, grid, fit, importance(self.factor, self.order), kept)
            fit = None
        return round_columns(
            values, self.factor, grid, kept=kept, fit=fit, order=self.order, chunk=settings.chunk
        )

    def _grid(self, rows: _Rows) -> ColumnGrid:
        qtype, pairs = self.weight.spec.qtype, self.weight.spec.pairs
        return ColumnGrid(
            self._columns(rows.scale),
            self._columns(rows.zero),
            self.weight.rows.scale_index().tolist(),
            qtype.qmin if pairs is None else -qtype.qmax,
            qtype.qmax,
            None if pairs is None else pairs.limit,
        )

    def _columns(self, rows: Array, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return rows `[N, K]` as columns first, `[groups, K, N / groups]`, on the device."""
        wide = np.array(rows, np.bool_ if dtype is torch.bool else np.float32)
        tensor = torch.from_numpy(wide).to(self.hessian.device)
        grouped = tensor.reshape(self.weight.rows.groups, -1, tensor.shape[-1])
        return grouped.mT.contiguous()

    def _rows(self, columns: Tensor) -> Array:
        """Undo `_columns`."""
        rows = columns.mT.reshape(-1, columns.shape[1])
        found: Array = rows.cpu().numpy()
        return found


def _read(value: ir.Value) -> Array:
    tensor = value.const_value
    assert tensor is not None
    return read_all(tensor)


def _without_zero_columns(hessian: SharedHessian, weight: Array) -> SharedHessian:
    """Return a Hessian that leaves input channels alone in which every weight is 0.

    They were pruned, or are computed elsewhere in float: what they would take up must not come
    back. Their codes stand for 0 before and after.
    """
    matrix = hessian.matrix
    used = np.any(weight.reshape(len(matrix), -1, weight.shape[-1]) != 0, axis=1)
    if used.all():
        return hessian
    factor = torch.from_numpy(used).to(matrix.device, matrix.dtype)
    return SharedHessian(matrix * factor[:, :, None] * factor[:, None, :])


def _falling(hessian: Tensor) -> list[int]:
    """Return columns by falling second moment of their data; equal ones in their own order."""
    moments = hessian.diagonal(dim1=-2, dim2=-1).mean(dim=0)
    found: list[int] = torch.argsort(moments, descending=True, stable=True).tolist()
    return found
