"""Arrays come back from memory and from files, and leave nothing behind."""

from pathlib import Path

import numpy as np

from qcompiler.passes.quantize.bias_shelf import Shelf


def test_a_shelf_forgets(tmp_path: Path) -> None:
    with Shelf(tmp_path, 100) as shelf:
        for call in range(3):
            shelf.put("a", call, np.full(10, call, np.float32))
        assert [int(shelf.get("a", call)[0]) for call in range(3)] == [0, 1, 2]
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == 1
        shelf.drop("a", 3)
        assert not list(folder.iterdir())
        shelf.put("b", 0, np.zeros(25, np.float32))
        assert not list(folder.iterdir())


def test_a_shelf_removes_its_files(tmp_path: Path) -> None:
    with Shelf(tmp_path, 0) as shelf:
        shelf.put("a", 0, np.zeros(3, np.float16))
        assert shelf.get("a", 0).dtype == np.float16
    assert not list(tmp_path.iterdir())
