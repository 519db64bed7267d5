"""Timing functions in turns, with a clock of the test's own."""

from collections.abc import Callable

import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.execution.latency import (
    Budget,
    Timing,
    compare_latency,
    run_in_turns,
    summarized,
)
from tests.support.graphs import build, random_array


class FakeClock:
    """A clock that moves when a run says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, *seconds: float) -> Callable[[], None]:
        """Return a function that takes these times in turn, the last one from then on."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_every_round_runs_all_and_begins_with_another() -> None:
    clock = FakeClock()
    runs = [clock.run(name, 1.0) for name in "abc"]
    rounds = run_in_turns(runs, Budget(seconds=0, fewest=4), clock)
    assert rounds == [[1.0] * 3] * 4
    turns = "abc" + "bca" + "cab" + "abc"
    assert "".join(clock.calls) == "abc" + "".join(2 * name for name in turns)


def test_warm_up_runs_are_not_counted() -> None:
    clock = FakeClock()
    rounds = run_in_turns([clock.run("a", 9, 1)], Budget(seconds=0, fewest=3), clock)
    assert rounds == [[1.0]] * 3


def test_the_shorter_run_of_a_turn_counts() -> None:
    clock = FakeClock()
    rounds = run_in_turns([clock.run("a", 0, 5, 2, 3, 7, 4)], Budget(0, fewest=3), clock)
    assert rounds == [[2], [3], [4]]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(seconds=10, fewest=2, most=100), 3),
        (Budget(seconds=10, fewest=7, most=100), 7),
        (Budget(seconds=10, fewest=2, most=3), 3),
    ],
)
def test_rounds_end_with_time_or_number(budget: Budget, expected: int) -> None:
    clock = FakeClock()
    assert len(run_in_turns([clock.run("a", 1.0), clock.run("b", 1.0)], budget, clock)) == expected


def test_the_first_is_what_others_are_compared_with() -> None:
    reference, other = summarized([[0.002, 0.001], [0.004, 0.001], [0.002, 0.001]])
    assert reference == Timing(2.0, 1.0, 1.0, 1.0)
    assert other == Timing(1.0, 0.5, 0.25, 0.5)
    assert summarized([[0.002, 0.001], [0.004, 0.004], [0.006, 0.003]])[1].milliseconds == 2.0


def test_a_load_that_slows_whole_rounds_changes_nothing() -> None:
    load = np.linspace(1, 5, 60)
    rounds = [[0.010 * factor, 0.007 * factor] for factor in load]
    assert summarized(rounds)[1].ratio == 0.7
    assert (summarized(rounds)[1].low, summarized(rounds)[1].high) == (0.7, 0.7)


def test_rare_interruptions_change_nothing() -> None:
    rounds = [[0.010, 0.007]] * 30 + [[0.010, 0.500]] * 5 + [[0.300, 0.007]] * 4
    timing = summarized(rounds)[1]
    assert timing == Timing(7.0, 0.7, 0.7, 0.7)


@pytest.mark.parametrize(("count", "low", "high"), [(5, 1, 5), (25, 8, 18), (100, 41, 60)])
def test_the_interval_is_that_of_the_sign_test(count: int, low: int, high: int) -> None:
    """The binomial distribution gives these ranks 93.8, 95.7 and 94.3 % (exactly)."""
    timing = summarized([[1.0, float(rank)] for rank in range(count, 0, -1)])[1]
    assert (timing.low, timing.high) == (low, high)


def test_a_run_of_no_time_is_as_fast_as_another() -> None:
    assert summarized([[0.0, 0.0]])[1].ratio == 1.0


def test_models_are_run_in_the_runtime() -> None:
    text = "g (float[64, 64] x) => (float[64, 64] y) {{ {} }}"
    small = build(text.format("y = Relu(x)"))
    large = build(text.format("a = MatMul(x, x) b = MatMul(a, a) y = MatMul(b, b)"))
    budget = Budget(seconds=0, fewest=5)
    timings = compare_latency((small, large), {"x": random_array(64, 64)}, budget, threads=1)
    assert timings[0].ratio == 1.0
    assert all(timing.milliseconds > 0 and timing.low <= timing.high for timing in timings)


def test_a_model_that_cannot_run_is_an_error() -> None:
    model = build("g (float[2, 2] x) => (float[2, 2] y) { y = Relu(x) }")
    with pytest.raises(TargetError):
        compare_latency((model,), {"x": random_array(3, 3)}, Budget(0))
