"""Rounding column by column, each error made up for by the columns that are still free.

Frantar et al. 2022, "GPTQ" (arXiv 2210.17323), after OBQ. With H the Hessian of an op's squared
output error and U the upper Cholesky factor of its inverse, `H^-1 = U^T U`, rounding column j of
the weight costs least when the columns behind it change by `-(w_j - q_j) / U[j, j] * U[j, j:]`.

Tensors hold columns first: `[groups, K, rows]`, so that a column is contiguous.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qcompiler.errors import ModelError

_MOST_DAMPING: Final = 1.0


@dataclass(slots=True, eq=False)
class ColumnGrid:
    """The numbers that columns can be rounded to.

    Attributes:
        scale: float32 `[groups, S, rows]`, one for each scale of a row.
        zero: Zero points as float32, the same shape.
        index: Which of the S scales each column has, ascending.
        qmin: Smallest code.
        qmax: Largest code.
        pair_limit: What the codes of columns 2i and 2i + 1 may add up to where they have one
            sign (`quant.scheme.PairLimit`); zero points are 0 then.
    """

    scale: Tensor
    zero: Tensor
    index: list[int]
    qmin: int
    qmax: int
    pair_limit: int | None = None


Fit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Chooses scale and zero point, `[groups, rows]` each, of columns `[groups, n, rows]` whose squared
errors count as much as the second argument says, `[groups, n]`."""


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """What compensation needs of a Hessian.

    Attributes:
        upper: float32 `[groups, K, K]`, U with `H^-1 = U^T U` of the damped Hessian.
        damping: What was added to the diagonal, as a part of its mean.
    """

    upper: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float) -> Factor:
    """Return U with `H^-1 = U^T U`.

    `H = R R^T` with R upper comes from the Cholesky factor of H read backwards, and U is the
    inverse of R: no inverse of H is ever formed.

    Args:
        hessian: `[groups, K, K]`, symmetric, positive semidefinite. Columns that no sample
            reaches, whose rows are zero, are rounded to nearest.
        damping: Part of the mean of the diagonal that is added to it, raised tenfold until H is
            positive definite in floating point.

    Raises:
        ModelError: It is not positive semidefinite at all, or holds NaN.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(dim=-1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    while True:
        damped = hessian.flip(-2, -1)
        added = damping * mean + torch.where(diagonal > 0, 0.0, mean)
        damped.diagonal(dim1=-2, dim2=-1).add_(added.flip(-1))
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if not info.any():
            break
        if damping >= _MOST_DAMPING or not torch.isfinite(mean).all():
            message = "the products of its data hold NaN or infinity, or overflow"
            raise ModelError(message, reason="weight-not-quantizable")
        damping = min(_MOST_DAMPING, max(10 * damping, 1e-6))
    factor = lower.flip(-2, -1)
    del lower
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    upper = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True)
    return Factor(upper.to(torch.float32), damping)


def round_columns(
    weight: Tensor,
    factor: Factor,
    grid: ColumnGrid,
    *,
    kept: Tensor | None = None,
    fit: Fit | None = None,
    order: list[int] | None = None,
    chunk: int = 128,
) -> Tensor:
    """Round a weight in place, column by column.

    Args:
        weight: float32 `[groups, K, rows]`; becomes what its codes stand for, and at `kept`
            elements what is left of them after compensation.
        factor: Of the Hessian, its columns in the order given by `order`.
        grid: What to round to. Its scales are replaced where `fit` is given.
        kept: Bool, of the weight's shape: elements that are not rounded. They take up the errors
            of others, and have the code that stands for 0.
        fit: Chooses each scale when its first column comes up, from columns that hold all
            compensation so far. Only in natural order.
        order: In which order columns are rounded; None is from first to last.
        chunk: Columns after which errors are carried on to all others. Changes speed only.

    Returns:
        Codes, int16 `[groups, K, rows]`, columns in natural order.
    """
    places = list(range(weight.shape[1])) if order is None else order
    counts = importance(factor, order)
    columns = weight if order is None else weight[:, order]
    rounding = _Rounding(factor.upper, grid, kept, places)
    codes = torch.empty(weight.shape, dtype=torch.int16, device=weight.device)
    for start, stop in _chunks(grid.index, len(places), chunk, whole_groups=fit is not None):
        if fit is not None:
            rounding.refit(columns, start, fit, counts)
        rounding.round_chunk(columns, codes, start, stop)
    if order is not None:
        weight[:, order] = columns
    return codes


def importance(factor: Factor, order: list[int] | None) -> Tensor:
    """Return what the squared rounding error of a column costs once it was made up for.

    Args:
        factor: Of the Hessian, in `order`.
        order: Of columns; None is their own.

    Returns:
        `[groups, K]`, columns in natural order: `1 / U[j, j]^2`.
    """
    found = factor.upper.diagonal(dim1=-2, dim2=-1).square().reciprocal()
    if order is None:
        return found
    natural = torch.empty_like(found)
    natural[:, order] = found
    return natural


def fit_all(
    weight: Tensor, grid: ColumnGrid, fit: Fit, counts: Tensor, kept: Tensor | None
) -> None:
    """Choose every scale of a grid from the columns as they are, those of `kept` left out."""
    rounding = _Rounding(weight, grid, kept, list(range(weight.shape[1])))
    for start, _ in _chunks(grid.index, weight.shape[1], weight.shape[1], whole_groups=True):
        rounding.refit(weight, start, fit, counts)


def _chunks(
    index: list[int], count: int, chunk: int, *, whole_groups: bool
) -> Iterator[tuple[int, int]]:
    """Cut columns into chunks; with `whole_groups` one begins where each scale does."""
    start = 0
    while start < count:
        stop = min(start + chunk, count)
        if whole_groups:
            same = (at for at in range(start, stop) if index[at] != index[start])
            stop = next(same, stop)
        yield start, stop
        start = stop


class _Rounding:
    """Rounds columns that may have been put in another order."""

    def __init__(
        self, upper: Tensor, grid: ColumnGrid, kept: Tensor | None, places: list[int]
    ) -> None:
        self._upper = upper
        self._grid = grid
        self._kept = kept
        self._places = places
        self._done: set[int] = set()

    def refit(self, columns: Tensor, start: int, fit: Fit, counts: Tensor) -> None:
        """Choose the scale that begins at a column; nothing where none does."""
        index = self._grid.index
        group = index[start]
        if start > 0 and index[start - 1] == group:
            return
        stop = start + index.count(group)
        values = columns[:, start:stop]
        if self._kept is not None:
            values = _without(values, self._kept[:, start:stop])
        found = fit(values, counts[:, start:stop])
        self._grid.scale[:, group], self._grid.zero[:, group] = found

    def round_chunk(self, columns: Tensor, codes: Tensor, start: int, stop: int) -> None:
        """Round columns `start` to `stop`, and carry their errors on to all behind them."""
        errors = torch.empty_like(columns[:, start:stop])
        for at in range(start, stop):
            place = self._places[at]
            column = columns[:, at]
            code, value = self._round(column, place, codes)
            codes[:, place] = code
            error = (column - value) / self._upper[:, at, at, None]
            errors[:, at - start] = error
            columns[:, at] = value
            following = self._upper[:, at, at + 1 : stop, None]
            columns[:, at + 1 : stop].baddbmm_(following, error[:, None], alpha=-1)
            self._done.add(place)
        if stop < columns.shape[1]:
            columns[:, stop:].baddbmm_(self._upper[:, start:stop, stop:].mT, errors, alpha=-1)

    def _round(self, column: Tensor, place: int, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes of a column and what they stand for."""
        grid = self._grid
        scale, zero = grid.scale[:, grid.index[place]], grid.zero[:, grid.index[place]]
        code = (column / scale).round_().add_(zero).clamp_(grid.qmin, grid.qmax)
        if grid.pair_limit is not None and place ^ 1 in self._done:
            code = _within(code, codes[:, place ^ 1], grid.pair_limit)
        value = (code - zero) * scale
        if self._kept is not None:
            kept = self._kept[:, place]
            code, value = torch.where(kept, zero, code), torch.where(kept, column, value)
        return code, value


def _within(code: Tensor, partner: Tensor, limit: int) -> Tensor:
    """Bring codes nearer to 0 where, with partners of the same sign, they exceed a limit."""
    room = limit - partner.abs().to(code.dtype)
    same = code.sign() == partner.sign()
    return torch.where(same, torch.minimum(code.abs(), room) * code.sign(), code)


def _without(values: Tensor, kept: Tensor) -> Tensor:
    """Put the mean of the others of its row in the place of every element that is kept."""
    free = (~kept).to(values.dtype)
    mean = (values * free).sum(dim=1, keepdim=True) / free.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(kept, mean, values)
