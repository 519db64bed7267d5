"""How a chain of blocks is cut into windows."""

import itertools

import pytest

from qcompiler.errors import UsageError
from qcompiler.quant.reconstruction import BlockReconstruction
from qcompiler.reconstruction.windows import Window, cut_windows


def spans(windows: list[Window]) -> list[tuple[int, int]]:
    return [(window.start, window.stop) for window in windows]


@pytest.mark.parametrize(
    ("size", "overlap", "expected"),
    [
        (1, 0, [(2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]),
        (2, 0, [(2, 4), (4, 6), (6, 7)]),
        (2, 1, [(2, 4), (3, 5), (4, 6), (5, 7)]),
        (3, 1, [(2, 5), (4, 7)]),
        (4, 2, [(2, 6), (4, 7)]),
        (5, 0, [(2, 7)]),
        (9, 8, [(2, 7)]),
    ],
)
def test_windows_cover_all_blocks_and_share_some(
    size: int, overlap: int, expected: list[tuple[int, int]]
) -> None:
    assert spans(cut_windows(2, 6, size, overlap)) == expected


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("overlap", range(5))
def test_every_block_leaves_once_and_is_there_when_it_does(size: int, overlap: int) -> None:
    if overlap >= size:
        with pytest.raises(UsageError, match=f"{size} blocks cannot overlap by {overlap}"):
            BlockReconstruction(window=size, overlap=overlap)
        return
    windows = cut_windows(0, 7, size, overlap)
    assert [block for window in windows for block in window.left] == list(range(8))
    for window, following in itertools.pairwise(windows):
        assert list(window.staying) == list(range(following.start, window.stop))
        assert window.stop - following.start == overlap
