"""Values between blocks come back as they were, from memory and from disk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qcompiler.reconstruction.value_cache import ValueCache


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_value_comes_back(limit: int, dtype: torch.dtype, tmp_path: Path) -> None:
    values = (torch.arange(24).reshape(2, 3, 4) % 3).to(dtype)
    with ValueCache(tmp_path, limit) as cache:
        cache.put(0, "x", values)
        cache.put(1, "x", values[:, 1:2].transpose(0, 2))
        cache.put(1, "empty", values[:0])
        cache.put(1, "scalar", values[0, 0, 1])
        for name, call, expected in (
            ("x", 0, values),
            ("x", 1, values[:, 1:2].transpose(0, 2)),
            ("empty", 1, values[:0]),
            ("scalar", 1, values[0, 0, 1]),
        ):
            found = cache.get(call, name)
            assert isinstance(found, torch.Tensor)
            assert found.dtype == dtype
            assert torch.equal(found, expected)
        assert bool(list(tmp_path.iterdir())) == (limit == 0)
    assert list(tmp_path.iterdir()) == []


def test_the_limit_holds(tmp_path: Path) -> None:
    with ValueCache(tmp_path, 100) as cache:
        for call in range(4):
            cache.put(call, "x", torch.zeros(10))
        assert cache.held_bytes == 80
        assert len(list(next(tmp_path.iterdir()).iterdir())) == 2
        cache.put(0, "x", torch.zeros(2))
        assert cache.held_bytes == 48
        for call in range(4):
            cache.drop(call, "x")
        assert cache.held_bytes == 0
        assert list(next(tmp_path.iterdir()).iterdir()) == []


def test_a_part_of_a_large_tensor_is_held_alone(tmp_path: Path) -> None:
    with ValueCache(tmp_path, 1 << 20) as cache:
        cache.put(0, "x", torch.zeros(1000)[:10])
        found = cache.get(0, "x")
        assert isinstance(found, torch.Tensor)
        assert found.untyped_storage().nbytes() == 40


def test_texts_are_kept(tmp_path: Path) -> None:
    texts = np.array(["a", "bc"], dtype=object)
    with ValueCache(tmp_path, 0) as cache:
        cache.put(0, "x", texts)
        assert cache.get(0, "x") is texts
