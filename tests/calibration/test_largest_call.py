import numpy as np
import pytest

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.largest_call import largest_call
from qcompiler.errors import UsageError


def samples(*sizes: tuple[int, int]) -> Samples:
    calls = [
        {"a": np.full(first, index), "b": np.zeros(second)}
        for index, (first, second) in enumerate(sizes)
    ]
    return Samples("test", False, len(calls), lambda: iter(calls))


def test_the_first_call_with_the_most_elements() -> None:
    assert largest_call(samples((1, 5), (4, 3), (7, 0), (2, 2)))["a"].tolist() == [1] * 4


def test_no_call_is_an_error() -> None:
    with pytest.raises(UsageError, match="no sample"):
        largest_call(samples())
