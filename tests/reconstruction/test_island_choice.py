"""Choosing over all weights at once, exactly."""

from pathlib import Path

import numpy as np
import pytest

from qcompiler.reconstruction.island_choice import (
    ChannelScores,
    choose_channels,
    choose_elements,
    share_of_elements,
    shares_of_channels,
)
from qcompiler.reconstruction.tensor_files import TensorFiles


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_elements_are_chosen(seed: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(seed)
    arrays = {
        # Few distinct values, so that there are ties; and zeros, which are worth nothing.
        name: np.round(generator.random((int(generator.integers(1, 9)), 7)), 1).astype(np.float32)
        for name in "abc"
    }
    with TensorFiles(tmp_path) as files:
        for name, array in arrays.items():
            files.put(name, array)
        wanted = int(generator.integers(0, 150))
        cut = choose_elements(files, list(arrays), wanted)
        found = np.concatenate([a[cut.mask(name, a)] for name, a in arrays.items()])
    everything = np.sort(np.concatenate([a.reshape(-1) for a in arrays.values()]))[::-1]
    expected = everything[everything > 0][:wanted]
    np.testing.assert_array_equal(np.sort(found)[::-1], expected)


def test_no_weight_has_a_share_of_its_own(tmp_path: Path) -> None:
    with TensorFiles(tmp_path) as files:
        files.put("a", np.ones(50, np.float32))
        files.put("b", np.full(50, 2, np.float32))
        cut = choose_elements(files, ["a", "b"], 50)
        assert cut.mask("a", files.get("a")).sum() == 0
        assert cut.mask("b", files.get("b")).all()
        assert share_of_elements(files, {"a": 50, "b": 50}, 0.5) == pytest.approx(100 / 150)


def test_channels_are_taken_by_what_they_are_worth_for_their_cost() -> None:
    cheap = ChannelScores("cheap", np.array([3.0, 0.0, 1.0]), cost=10)
    dear = ChannelScores("dear", np.array([4.0, 8.0, 0.5]), cost=40)
    found = choose_channels([cheap, dear], 60)
    assert {name: each.tolist() for name, each in found.items()} == {"cheap": [0, 2], "dear": [1]}
    assert choose_channels([cheap, dear], 5) == {}


def test_units_are_whole() -> None:
    scores = ChannelScores("w", np.arange(10.0), cost=1, unit=4)
    assert choose_channels([scores], 7)["w"].tolist() == [6, 7, 8, 9]
    assert choose_channels([scores], 100)["w"].tolist() == list(range(10))


def test_channels_that_are_worth_nothing_are_not_chosen() -> None:
    scores = ChannelScores("w", np.array([0.0, 1.0, 0.0]), cost=1)
    assert choose_channels([scores], 3)["w"].tolist() == [1]


def test_shares_of_channels() -> None:
    scores = ChannelScores("w", np.array([3.0, 1.0, 0.0, 0.0]), cost=5)
    assert shares_of_channels([scores], [0.25, 0.5]) == {0.25: 0.75, 0.5: 1.0}


def test_files_go_when_the_context_ends(tmp_path: Path) -> None:
    with TensorFiles(tmp_path) as files:
        files.add("w", np.ones((2, 3), np.float32))
        files.add("w", np.ones((2, 3), np.float32))
        np.testing.assert_array_equal(files.get("w"), np.full((2, 3), 2))
        assert "v" not in files
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
