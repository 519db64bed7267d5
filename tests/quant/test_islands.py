"""What islands may cost, and what a weight is worth."""

import numpy as np
import pytest

from qcompiler.errors import UsageError
from qcompiler.quant.granularity import PerBlock
from qcompiler.quant.islands import (
    IslandBudget,
    IslandKind,
    IslandRequest,
    Saliency,
    quantized_bits,
    saliency_scores,
)
from qcompiler.quant.qtype import INT4, UINT3
from qcompiler.quant.recipe import Recipe
from qcompiler.quant.scheme import QSpec

_W = np.array([[-2.0, 3.0]], np.float32)
_G = np.array([[5.0, 7.0]], np.float32)
_Q = np.array([[-1.5, 3.25]], np.float32)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (Saliency.TACQ, [2 * 5 * 0.5, 3 * 7 * 0.25]),
        (Saliency.QAL, [5 * 0.5, 7 * 0.25]),
        (Saliency.MSG, [10, 21]),
        (Saliency.GRADIENT, [5, 7]),
        (Saliency.MAGNITUDE, [2, 3]),
        (Saliency.SPQR, [5 * 0.25, 7 * 0.0625]),
        (Saliency.SLIM, [5 * 4, 7 * 9]),
    ],
)
def test_measures_are_their_formulas(measure: Saliency, expected: list[float]) -> None:
    found = saliency_scores(measure, _W, _G, _Q, seed=0)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)
    assert found.dtype == np.float32


def test_the_random_measure_is_the_same_for_a_seed() -> None:
    one, same, other = (
        saliency_scores(Saliency.RANDOM, _W, None, None, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_small_gradients_do_not_vanish() -> None:
    tiny = np.full((1, 2), 1e-12, np.float32)
    assert (saliency_scores(Saliency.TACQ, _W, tiny, _Q, seed=0) > 0).all()


@pytest.mark.parametrize(
    "numbers", [{}, {"average_bits": 3.0, "nbytes": 5}, {"fraction": 1.5}, {"average_bits": -1.0}]
)
def test_there_is_one_budget(numbers: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="one budget"):
        IslandBudget(**numbers)  # type: ignore[arg-type]


def test_room_is_what_the_budget_leaves() -> None:
    assert IslandBudget(average_bits=3.5).room(300, 100, 80) == 50
    assert IslandBudget(nbytes=50).room(300, 100, 80) == 100
    assert IslandBudget(fraction=0.25).room(300, 100, 80) == 20
    with pytest.raises(UsageError, match=r"take 3\.000 bits per weight, which is above --average"):
        IslandBudget(average_bits=2.5).room(300, 100, 80)


def test_codes_count_their_own_bits_or_their_containers() -> None:
    spec = QSpec(UINT3, PerBlock(0, 16), symmetric=False)
    assert quantized_bits((64, 10), spec, 16, stored=False) == 640 * 3 + 40 * (16 + 4)
    assert quantized_bits((64, 10), spec, 32, stored=True) == 640 * 4 + 40 * (32 + 4)
    spec = QSpec(INT4, PerBlock(0, 48), symmetric=True)
    assert quantized_bits((64, 10), spec, 16, stored=True) == 640 * 4 + 20 * 16


@pytest.mark.parametrize(
    "request_",
    [
        IslandRequest(Saliency.TACQ, IslandBudget(average_bits=3.1), IslandKind.COLUMN),
        IslandRequest(Saliency.QAL, IslandBudget(nbytes=1000), IslandKind.NODE),
        IslandRequest(Saliency.RANDOM, IslandBudget(fraction=0.0035), IslandKind.WEIGHT, 16),
    ],
)
def test_recipes_hold_requests(request_: IslandRequest) -> None:
    recipe = Recipe(islands=request_)
    assert Recipe.from_text(recipe.to_toml(), "r") == recipe
