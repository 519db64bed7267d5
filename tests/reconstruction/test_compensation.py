"""Compensated rounding, against the textbook written column by column in NumPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.reconstruction.compensation import ColumnGrid, factorize, round_columns
from tests.support.graphs import random_array

Array = npt.NDArray[Any]


def correlated(rows: int, width: int, seed: int = 0) -> Array:
    """Return data whose channels depend on each other and differ in size."""
    mix = random_array(width, width, seed=seed + 100) / np.sqrt(width) + np.eye(width)
    sizes = np.exp(random_array(width, seed=seed + 200))
    found: Array = (random_array(rows, width, seed=seed) @ mix * sizes).astype(np.float64)
    return found


def reference(
    weight: Array,
    hessian: Array,
    scale: Array,
    zero: Array,
    limits: tuple[int, int],
    damping: float,
    order: Sequence[int] | None = None,
) -> Array:
    """Return codes by GPTQ's equations: no chunks, no factor read backwards, float64.

    Args:
        weight: `[rows, K]`.
        hessian: `[K, K]`.
        scale: `[rows, K]`, the scale of every element.
        zero: The same for zero points.
        limits: Least and largest code.
        damping: Part of the mean of the diagonal.
        order: Of columns.
    """
    places = list(range(weight.shape[1])) if order is None else list(order)
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    damped = damped[places][:, places]
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = weight.astype(np.float64)[:, places]
    codes = np.zeros(weight.shape, np.int64)
    for at, place in enumerate(places):
        step, zero_point = scale[:, place], zero[:, place]
        code = np.clip(np.rint(left[:, at] / step) + zero_point, *limits)
        error = (left[:, at] - (code - zero_point) * step) / upper[at, at]
        left[:, at:] -= np.outer(error, upper[at, at:])
        codes[:, place] = code
    return codes


def _columns(rows: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows.T[np.newaxis], np.float32))


def _grid(weight: Array, bits: int, block: int, *, limit: int | None = None) -> ColumnGrid:
    """Return asymmetric min-max grids of blocks along the rows."""
    starts = range(0, weight.shape[1], block)
    low = np.stack([np.minimum(weight[:, s : s + block].min(axis=1), 0) for s in starts], axis=1)
    high = np.stack([np.maximum(weight[:, s : s + block].max(axis=1), 0) for s in starts], axis=1)
    top = 2**bits - 1
    scale = ((high - low) / top).astype(np.float32)
    zero = np.rint(-low / scale)
    index = [column // block for column in range(weight.shape[1])]
    return ColumnGrid(_columns(scale), _columns(zero), index, 0, top, limit)


def _spread(parts: torch.Tensor, grid: ColumnGrid) -> Array:
    found: Array = parts[0, grid.index].T.numpy().astype(np.float64)
    return found


def _hessian(data: Array) -> Array:
    found: Array = 2 * data.T @ data
    return found


def _rounded(
    weight: Array, hessian: Array, grid: ColumnGrid, damping: float = 0.01, **options: Any
) -> tuple[Array, Array]:
    """Return codes and values as rows."""
    order = options.get("order")
    whole = torch.from_numpy(hessian[np.newaxis])
    arranged = whole if order is None else whole[:, order][:, :, order]
    values = _columns(weight)
    codes = round_columns(values, factorize(arranged, damping), grid, **options)
    return codes[0].T.numpy(), values[0].T.numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [16, 24, 80])
@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_codes_are_those_of_the_textbook(bits: int, block: int, chunk: int) -> None:
    weight, data = random_array(9, 80), correlated(200, 80)
    grid = _grid(weight, bits, block)
    expected = reference(
        weight,
        _hessian(data),
        _spread(grid.scale, grid),
        _spread(grid.zero, grid),
        (0, 2**bits - 1),
        0.01,
    )
    codes, values = _rounded(weight, _hessian(data), grid, chunk=chunk)
    np.testing.assert_array_equal(codes, expected)
    restored = (expected - _spread(grid.zero, grid)) * _spread(grid.scale, grid)
    np.testing.assert_allclose(values, restored, rtol=1e-6, atol=1e-6)


def test_columns_are_rounded_in_the_order_asked_for() -> None:
    weight, data = random_array(9, 80), correlated(200, 80)
    grid = _grid(weight, 3, 16)
    hessian = _hessian(data)
    order = np.argsort(-np.diag(hessian), kind="stable").tolist()
    spread = (_spread(grid.scale, grid), _spread(grid.zero, grid))
    expected = reference(weight, hessian, *spread, (0, 7), 0.01, order)
    codes, _ = _rounded(weight, hessian, grid, order=order)
    np.testing.assert_array_equal(codes, expected)
    natural, _ = _rounded(weight, hessian, grid)
    assert (natural != codes).any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_nearer_than_with_the_nearest_codes(bits: int) -> None:
    weight, data = random_array(16, 64), correlated(400, 64)
    grid = _grid(weight, bits, 32)
    scale, zero = _spread(grid.scale, grid), _spread(grid.zero, grid)
    nearest = (np.clip(np.rint(weight / scale) + zero, 0, 2**bits - 1) - zero) * scale
    _, values = _rounded(weight, _hessian(data), grid)
    held_out = correlated(400, 64, seed=0)[::-1] + 0.1 * random_array(400, 64, seed=9)

    def error(found: Array) -> float:
        return float(np.square(held_out @ (found - weight).T).sum())

    assert error(values) < 0.8 * error(nearest)


def test_groups_of_a_convolution_are_independent() -> None:
    weights = [random_array(5, 12, seed=seed) for seed in range(3)]
    hessians = [_hessian(correlated(60, 12, seed=seed)) for seed in range(3)]
    grids = [_grid(weight, 4, 12) for weight in weights]
    together = ColumnGrid(
        torch.cat([grid.scale for grid in grids]),
        torch.cat([grid.zero for grid in grids]),
        grids[0].index,
        0,
        15,
    )
    values = torch.cat([_columns(weight) for weight in weights])
    factor = factorize(torch.from_numpy(np.stack(hessians)), 0.01)
    codes = round_columns(values, factor, together)
    for at, (weight, hessian, grid) in enumerate(zip(weights, hessians, grids, strict=True)):
        alone, _ = _rounded(weight, hessian, grid)
        np.testing.assert_array_equal(codes[at].T.numpy(), alone)


def test_a_scale_is_chosen_from_what_compensation_left() -> None:
    weight, data = random_array(6, 32), correlated(100, 32)
    grid = _grid(weight, 3, 16)
    seen: list[torch.Tensor] = []

    def fit(columns: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert counts.shape == columns.shape[:2]
        seen.append(columns.clone())
        scale = columns.abs().amax(dim=1) / 3
        return scale, torch.full_like(scale, 4)

    # A chunk that is no multiple of a block must not let a scale miss errors of its own chunk.
    codes, _ = _rounded(weight, _hessian(data), grid, fit=fit, chunk=24)
    assert [tuple(columns.shape) for columns in seen] == [(1, 16, 6), (1, 16, 6)]
    np.testing.assert_array_equal(seen[0][0].T.numpy(), weight[:, :16])
    assert not np.allclose(seen[1][0].T.numpy(), weight[:, 16:])
    scale, zero = _spread(grid.scale, grid), _spread(grid.zero, grid)
    expected = reference(weight, _hessian(data), scale, zero, (0, 7), 0.01)
    np.testing.assert_array_equal(codes, expected)


def test_kept_elements_take_up_errors_and_make_none() -> None:
    weight, data = random_array(6, 32), correlated(100, 32)
    hessian, grid = _hessian(data), _grid(weight, 2, 32)
    kept = random_array(6, 32, seed=3) > 1
    codes, values = _rounded(weight, hessian, grid, kept=_columns(kept).bool())
    zero = _spread(grid.zero, grid)
    np.testing.assert_array_equal(codes[kept], zero[kept])
    restored = (codes - zero) * _spread(grid.scale, grid)
    np.testing.assert_allclose(values[~kept], restored[~kept], rtol=1e-6, atol=1e-6)
    assert not np.allclose(values[kept], weight[kept])

    def error(found: Array) -> float:
        return float(np.square(data @ (found - weight).T).sum())

    _, without = _rounded(weight, hessian, _grid(weight, 2, 32))
    assert error(values) < error(without)


def test_a_weight_that_is_kept_whole_does_not_change() -> None:
    weight, data = random_array(6, 32), correlated(100, 32)
    kept = torch.ones(1, 32, 6, dtype=torch.bool)
    _, values = _rounded(weight, _hessian(data), _grid(weight, 2, 32), kept=kept)
    np.testing.assert_array_equal(values, weight)


@pytest.mark.parametrize(
    "order", [None, list(range(31, -1, -1)), [*range(1, 32, 2), *range(0, 32, 2)]]
)
def test_neighbouring_codes_stay_within_their_limit(order: list[int] | None) -> None:
    weight, data = np.abs(random_array(6, 32)), correlated(100, 32)
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    grid = ColumnGrid(
        _columns(scale.astype(np.float32)), _columns(np.zeros((6, 1))), [0] * 32, -127, 127, 128
    )
    codes, _ = _rounded(weight, _hessian(data), grid, order=order)
    first, second = codes[:, 0::2], codes[:, 1::2]
    same = first * second > 0
    assert (np.abs(first) + np.abs(second))[same].max() <= 128
    assert np.abs(codes).max() <= 127
    grid.pair_limit = None
    free, _ = _rounded(weight, _hessian(data), grid, order=order)
    assert (np.abs(free[:, 0::2]) + np.abs(free[:, 1::2])).max() > 128


def test_a_column_that_no_sample_reaches_has_the_nearest_codes() -> None:
    weight, data = random_array(6, 32), correlated(100, 32)
    data[:, [3, 20]] = 0
    grid = _grid(weight, 3, 32)
    codes, _ = _rounded(weight, _hessian(data), grid, damping=0.0)
    scale, zero = _spread(grid.scale, grid), _spread(grid.zero, grid)
    nearest = np.clip(np.rint(weight / scale) + zero, 0, 7)
    np.testing.assert_array_equal(codes[:, [3, 20]], nearest[:, [3, 20]])


def test_damping_rises_until_a_singular_hessian_can_be_factored() -> None:
    data = correlated(3, 32)
    hessian = torch.from_numpy(_hessian(data)[np.newaxis])
    factor = factorize(hessian, 0.0)
    assert 0 < factor.damping <= 1e-3
    assert torch.isfinite(factor.upper).all()
    assert factorize(hessian, 0.01).damping == 0.01


def test_a_factor_is_that_of_the_inverse() -> None:
    hessian = _hessian(correlated(100, 32))
    upper = factorize(torch.from_numpy(hessian[np.newaxis]), 0.0).upper[0].double().numpy()
    assert np.allclose(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ hessian, np.eye(32), atol=1e-3)


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    hessian = torch.eye(4, dtype=torch.float64)[None]
    hessian[0, 2, 2] = torch.nan
    with pytest.raises(ModelError, match="hold NaN or infinity"):
        factorize(hessian, 0.01)
