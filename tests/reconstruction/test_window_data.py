"""Calls one by one, or several at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.reconstruction.joined_calls import Fed
from qcompiler.reconstruction.window_data import WindowData


def _data(lengths: Sequence[int], *, joins: bool, masks: bool = False) -> WindowData:
    def feeds(call: int) -> Fed:
        return {"x": torch.full((1, lengths[call]), float(call))}

    def targets(call: int) -> tuple[tuple[Tensor, ...], ...]:
        return ((torch.full((1, lengths[call]), -float(call)),),)

    def keep(call: int) -> Tensor | None:
        return torch.ones(1, lengths[call], dtype=torch.bool) if masks else None

    return WindowData(feeds, targets, keep, joins=joins)


def test_calls_of_equal_shape_are_joined_in_their_order() -> None:
    batches = _data([4] * 5, joins=True, masks=True).batches([3, 0, 4, 1, 2], 2)
    assert [batch.calls for batch in batches] == [2, 2, 1]
    first = batches[0]
    assert isinstance(first.feeds["x"], Tensor)
    assert first.feeds["x"][:, 0].tolist() == [3, 0]
    assert first.targets[0][0][:, 0].tolist() == [-3, 0]
    assert first.keep is not None
    assert first.keep.shape == (2, 4)


def test_other_shapes_stay_apart() -> None:
    batches = _data([4, 4, 6, 6, 4], joins=True).batches(range(5), 8)
    assert [batch.calls for batch in batches] == [2, 2, 1]


def test_calls_that_cannot_be_joined_come_one_by_one() -> None:
    batches = _data([4] * 3, joins=False).batches(range(3), 8)
    assert [batch.calls for batch in batches] == [1, 1, 1]


def test_where_only_some_calls_are_padded() -> None:
    padding = torch.tensor([[True, True, False]])

    def feeds(call: int) -> Fed:
        return {"x": torch.full((1, 3), float(call))}

    def targets(call: int) -> tuple[tuple[Tensor, ...], ...]:
        return ((torch.zeros(1, 3),),)

    data = WindowData(feeds, targets, lambda call: padding if call == 1 else None, joins=True)
    mixed, whole = data.batches([0, 1, 2, 3], 2)
    assert mixed.keep is not None
    assert mixed.keep.tolist() == [[True, True, True], [True, True, False]]
    assert whole.keep is None
