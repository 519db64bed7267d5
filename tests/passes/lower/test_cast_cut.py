"""The cheapest division of a graph, against trying all of them."""

import itertools

import numpy as np
import pytest

from qcompiler.passes.lower.cast_cut import cheapest_division

COST = 10


def cost(
    side: frozenset[int], groups: list[list[int]], penalties: list[int], forced: set[int]
) -> float:
    if not forced <= side:
        return float("inf")
    divided = sum(0 < len(side & set(group)) < len(set(group)) for group in groups)
    return divided * COST + sum(penalties[vertex] for vertex in side - forced)


@pytest.mark.parametrize("seed", range(40))
def test_no_division_is_cheaper(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = 8
    penalties = [int(penalty) for penalty in generator.integers(0, 25, count)]
    groups = [
        [int(vertex) for vertex in generator.permutation(count)[: generator.integers(2, 5)]]
        for _ in range(9)
    ]
    forced = {int(vertex) for vertex in generator.integers(0, count, 2)}
    found = frozenset(cheapest_division(groups, COST, penalties, forced))
    sides = [
        frozenset(side)
        for size in range(count + 1)
        for side in itertools.combinations(range(count), size)
    ]
    best = min(cost(side, groups, penalties, forced) for side in sides)
    assert cost(found, groups, penalties, forced) == best
    cheapest = [side for side in sides if cost(side, groups, penalties, forced) == best]
    assert len(found) == min(len(side) for side in cheapest)


def test_nothing_forced_costs_nothing() -> None:
    assert cheapest_division([[0, 1], [1, 2]], COST, [1, 1, 1], []) == set()


def test_a_group_is_paid_for_once() -> None:
    """Nine readers of one value: one Cast, cheaper than moving any of them."""
    group = list(range(10))
    assert cheapest_division([group], COST, [5] * 10, [0]) == {0}
    pairs = [[0, vertex] for vertex in range(1, 10)]
    assert cheapest_division(pairs, COST, [5] * 10, [0]) == set(group)


def test_long_chains_need_no_deep_stack() -> None:
    chain = [[vertex, vertex + 1] for vertex in range(20_000)]
    assert len(cheapest_division(chain, COST, [1] * 20_001, [0, 5])) == 6
