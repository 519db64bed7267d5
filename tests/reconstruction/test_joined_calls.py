"""Several calls at once, where that gives for each what it gives alone."""

import pytest
import torch
from torch import Tensor

from qcompiler.reconstruction.joined_calls import Fed, can_join, is_out_of_memory, run_joined


@pytest.mark.parametrize(
    ("joins", "window"),
    [
        (True, lambda x: x * 2),
        (True, lambda x: x.softmax(-1)),
        (False, lambda x: x - x.mean(0)),
        (False, lambda x: x.reshape(1, -1)),
        (False, lambda x: x.sum()),
    ],
)
def test_whether_calls_can_be_joined_is_tried(joins: bool, window: object) -> None:
    assert callable(window)

    def run(feeds: Fed) -> list[Tensor]:
        return [window(feeds["x"])]

    feeds: list[Fed] = [{"x": torch.randn(1, 6)}, {"x": torch.randn(1, 6)}]
    assert can_join(run, feeds) == joins
    assert not can_join(run, [feeds[0], {"x": torch.randn(1, 7)}])
    assert not can_join(run, [{"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)}])


class _Doubler:
    """Doubles what it is fed, if memory suffices."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.rows: list[int] = []

    def __call__(self, feeds: Fed) -> list[Tensor]:
        x = feeds["x"]
        assert isinstance(x, Tensor)
        if len(x) > self.room:
            message = "out of memory"
            raise torch.OutOfMemoryError(message)
        self.rows.append(len(x))
        return [x * 2]


def _feeds(*lengths: int) -> list[Fed]:
    return [{"x": torch.full((1, length), float(at))} for at, length in enumerate(lengths)]


def _values(run: _Doubler, feeds: list[Fed], most: int) -> list[list[float]]:
    return [found[0][0].tolist() for found in run_joined(run, feeds, most)]


def test_neighbours_of_equal_shape_run_joined() -> None:
    run = _Doubler()
    found = _values(run, _feeds(2, 2, 2, 3, 3, 2), 2)
    assert found == [[0, 0], [2, 2], [4, 4], [6, 6, 6], [8, 8, 8], [10, 10]]
    # Two alone and joined, to try; then that pair, the third one, and the same for the others.
    assert run.rows == [1, 1, 2, 2, 1, 1, 1, 2, 2, 1]


def test_one_at_a_time_tries_nothing() -> None:
    run = _Doubler()
    _values(run, _feeds(2, 2, 2), 1)
    assert run.rows == [1, 1, 1]


def test_calls_that_mix_run_alone() -> None:
    def run(feeds: Fed) -> list[Tensor]:
        x = feeds["x"]
        assert isinstance(x, Tensor)
        return [x - x.mean(0)]

    found = list(run_joined(run, _feeds(2, 2, 2), 4))
    assert all(not each[0].any() for each in found)


def test_large_calls_run_alone() -> None:
    run = _Doubler()
    feeds: list[Fed] = [{"x": torch.zeros(1, 5 << 20)} for _ in range(3)]
    assert len(list(run_joined(run, feeds, 16))) == 3
    assert run.rows == [1, 1, 1]


def test_half_of_the_calls_run_where_memory_runs_out() -> None:
    run = _Doubler(room=3)
    assert _values(run, _feeds(1, 1, 1, 1, 1), 16) == [[0], [2], [4], [6], [8]]
    assert run.rows == [1, 1, 2, 2, 3]


def test_other_errors_are_not_swallowed() -> None:
    def run(feeds: Fed) -> list[Tensor]:
        x = feeds["x"]
        assert isinstance(x, Tensor)
        if len(x) > 2:
            message = "broken"
            raise RuntimeError(message)
        return [x]

    with pytest.raises(RuntimeError, match="broken"):
        list(run_joined(run, _feeds(1, 1, 1), 3))
    assert not is_out_of_memory(RuntimeError("broken"))
