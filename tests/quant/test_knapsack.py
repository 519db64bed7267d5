"""The knapsack is exact: it is compared with trying everything."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.quant.knapsack import Option, choose_options

_OPTIONS = st.lists(
    st.builds(Option, st.integers(0, 30), st.floats(0, 10, allow_subnormal=False)),
    min_size=1,
    max_size=4,
)


@given(st.lists(_OPTIONS, min_size=1, max_size=5), st.integers(0, 100))
def test_nothing_better_exists(things: list[list[Option]], budget: int) -> None:
    sums = [
        sum(option.damage for option in options)
        for options in itertools.product(*things)
        if sum(option.cost for option in options) <= budget
    ]
    chosen = choose_options(things, budget)
    if not sums:
        assert chosen is None
        return
    assert chosen is not None
    picked = [options[at] for options, at in zip(things, chosen, strict=True)]
    assert sum(option.cost for option in picked) <= budget
    assert sum(option.damage for option in picked) == pytest.approx(min(sums), abs=1e-9)


def test_a_large_model_takes_a_moment() -> None:
    generator = np.random.default_rng(0)
    sizes = [576 * 576, 576 * 192, 576 * 1536]
    things = []
    for at in range(210):
        size, weight = sizes[at % 3], generator.lognormal()
        things.append(
            [Option(size * b, weight * 4.0**-b * generator.uniform(0.8, 1.2)) for b in (2, 4, 8)]
        )
    begin = time.process_time()
    chosen = choose_options(things, int(3.1 * sum(options[0].cost // 2 for options in things)))
    assert chosen is not None
    assert set(chosen) == {0, 1, 2}
    assert time.process_time() - begin < 20


def test_equal_solutions_give_one() -> None:
    things = [[Option(1, 1.0), Option(2, 0.0)]] * 4
    assert choose_options(things, 6) == choose_options(things, 6)
    assert sum(choose_options(things, 6) or ()) == 2
