import json

import numpy as np
import pytest

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.input_statistics import (
    InputMoments,
    InputStatistics,
    input_shift,
)
from tests.support.graphs import Array

TINT = np.array([0.5, 0.45, 0.35])[:, None, None]


def _images(count: int, seed: int) -> Array:
    """Return pictures whose brightness varies far more than their channels differ."""
    rng = np.random.default_rng(seed)
    light = rng.normal(0, 0.2, (count, 1, 1, 1))
    noise = rng.normal(0, 0.1, (count, 3, 8, 8))
    return np.asarray(TINT + light + noise, np.float32)


def _statistics(array: Array, batch: int = 16) -> InputStatistics:
    moments = InputMoments()
    for start in range(0, len(array), batch):
        moments.add(array[start : start + batch])
    found = moments.statistics()
    assert found is not None
    return found


def test_moments() -> None:
    images = _images(50, 0)
    found = _statistics(images)
    assert (found.samples, found.axis) == (50, 1)
    assert found.mean == pytest.approx(images.mean((0, 2, 3)), rel=1e-5)
    assert found.std == pytest.approx(images.std((0, 2, 3)), rel=1e-4)
    assert np.array(found.spread) == pytest.approx(np.cov(images.mean((2, 3)).T), rel=1e-3)
    assert InputStatistics.from_table(json.loads(json.dumps(found.to_table()))) == found
    last = _statistics(np.moveaxis(images, 1, 3))
    assert last.axis == 3
    assert last.mean == pytest.approx(found.mean)


def test_data_of_the_same_kind_fits() -> None:
    then = _statistics(_images(60, 1))
    for seed in range(2, 22):
        assert not input_shift("x", then, _statistics(_images(60, seed))).sure


def test_reversed_channels_are_named() -> None:
    then = _statistics(_images(60, 1)[:, ::-1])
    found = input_shift("x", then, _statistics(_images(60, 2)))
    assert found.sure
    assert found.shift > 0.1
    assert "reverse order, BGR for RGB" in found.reason


def test_another_scale_is_named() -> None:
    found = input_shift("x", _statistics(_images(60, 1)), _statistics(255 * _images(60, 2)))
    assert found.sure
    assert "times as wide" in found.reason


def test_other_means_are_named() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((100, 20)).astype(np.float32)
    found = input_shift("x", _statistics(rows), _statistics(rows[::-1] + np.float32(0.7)))
    assert found.sure
    assert found.shift == pytest.approx(0.7, rel=0.05)
    assert "0.7 standard deviations" in found.reason
    assert input_shift("x", _statistics(rows), _statistics(_images(9, 0))).shift == np.inf


def test_samples_gather_them_with_their_hash() -> None:
    calls = [{"x": _images(4, 0), "ids": np.arange(3)}, {"x": _images(4, 1), "ids": np.arange(3)}]
    samples = Samples("here", False, 2, lambda: iter(calls))
    assert list(samples.input_statistics()) == ["x"]
    assert samples.input_statistics()["x"].samples == 8
    spoiled = Samples("here", False, 1, lambda: iter([{"x": np.full((2, 2), np.nan)}]))
    assert spoiled.input_statistics() == {}
