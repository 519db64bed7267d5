"""Dividing samples into those that calibrate and those that judge."""

import numpy as np
import pytest

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.held_out import hold_out, spread


def numbered(count: int) -> Samples:
    return Samples("numbers", False, count, lambda: ({"x": np.array(i)} for i in range(count)))


def numbers(samples: Samples) -> list[int]:
    found = [int(feeds["x"]) for feeds in samples]
    assert len(found) == len(samples)
    return found


@pytest.mark.parametrize(("count", "held"), [(2, 1), (3, 1), (7, 1), (8, 2), (32, 8)])
def test_the_last_quarter_is_held_out(count: int, held: int) -> None:
    calibrating, judging = hold_out(numbered(count))
    assert numbers(calibrating) == list(range(count - held))
    assert numbers(judging) == list(range(count - held, count))
    assert numbers(judging) == numbers(judging)
    assert judging.origin.startswith("the last ")


def test_a_single_call_is_both() -> None:
    calibrating, judging = hold_out(numbered(1))
    assert numbers(calibrating) == numbers(judging) == [0]


def test_calls_are_spread_evenly() -> None:
    assert numbers(spread(numbered(10), 4)) == [0, 2, 5, 7]
    assert numbers(spread(numbered(3), 4)) == [0, 1, 2]
