"""The smallest set to leave out, found with few tries."""

from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.export.bisection import leave_out_least

PARTS = tuple(f"n{index}" for index in range(64))


class Trial:
    """Fails while any of the culprits is there."""

    def __init__(self, *culprits: str, hopeless: bool = False) -> None:
        self.culprits, self.hopeless = set(culprits), hopeless
        self.tried: list[tuple[str, ...]] = []

    def __call__(self, left_out: tuple[str, ...]) -> bool:
        self.tried.append(left_out)
        return not self.hopeless and self.culprits <= set(left_out)


def test_nothing_is_left_out_where_all_works() -> None:
    trial = Trial()
    found = leave_out_least(PARTS, trial)
    assert found is not None
    assert (found.parts, found.minimal, found.tries) == ((), True, 1)


def test_says_where_it_fails_without_any() -> None:
    trial = Trial(hopeless=True)
    assert leave_out_least(PARTS, trial) is None
    assert len(trial.tried) == 2


@given(st.sets(st.sampled_from(PARTS), min_size=1, max_size=6))
def test_finds_exactly_the_culprits(culprits: set[str]) -> None:
    trial = Trial(*culprits)
    found = leave_out_least(PARTS, trial, most_tries=200)
    assert found is not None
    assert found.parts == tuple(sorted(culprits, key=PARTS.index))
    assert found.minimal
    assert len(set(trial.tried)) == len(trial.tried) == found.tries, "nothing is tried twice"
    count = len(culprits)
    assert found.tries <= 2 * count * log2(len(PARTS) / count) + 4 * count + 3


def test_of_two_reasons_the_earlier_part_is_kept() -> None:
    """Either of two parts may stay, but not both."""

    def works(left_out: tuple[str, ...]) -> bool:
        return "n3" in left_out or "n40" in left_out

    found = leave_out_least(PARTS, works)
    assert found is not None
    assert found.parts == ("n40",)
    assert found.minimal


def test_what_is_found_when_tries_run_out_works() -> None:
    trial = Trial("n5", "n33", "n60")
    found = leave_out_least(PARTS, trial, most_tries=7)
    assert found is not None
    assert not found.minimal
    assert found.tries == 7
    assert trial.culprits <= set(found.parts) < set(PARTS)


def test_a_result_works_though_leaving_out_more_breaks_it() -> None:
    """`n1` and `n2` go together: one without the other fails."""

    def works(left_out: tuple[str, ...]) -> bool:
        return "n9" in left_out and ("n1" in left_out) == ("n2" in left_out)

    found = leave_out_least(PARTS[:16], works)
    assert found is not None
    assert works(found.parts)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_parts(count: int) -> None:
    found = leave_out_least(PARTS[:count], Trial(PARTS[count - 1]))
    assert found is not None
    assert found.parts == (PARTS[count - 1],)
