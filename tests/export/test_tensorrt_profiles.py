"""Ranges of shapes that engines are built for."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.engine import EngineRequest, with_profiles
from qcompiler.errors import UsageError
from qcompiler.export.tensorrt_profiles import ShapeRange, parse_profile, profiles_of
from qcompiler.export.to_tensorrt import EngineOptions
from tests.support.graphs import build


def samples(*shapes: tuple[int, ...]) -> Samples:
    def read() -> Iterator[Feeds]:
        for shape in shapes:
            yield {"x": np.zeros(shape, np.float32), "k": np.array([1, shape[0], 5])}

    return Samples("test", False, len(shapes), read)


def test_samples_give_extents_of_every_axis_and_the_most_common_shape() -> None:
    found = profiles_of(samples((1, 16), (8, 2), (4, 4), (4, 4)))
    values = ((1, 1, 5), (1, 4, 5), (1, 8, 5))
    assert found == {
        "x": ShapeRange((1, 2), (4, 4), (8, 16)),
        "k": ShapeRange((3,), (3,), (3,), values),
    }
    assert found["x"].as_lists() == [[1, 2], [4, 4], [8, 16]]


def test_of_equally_common_shapes_the_larger_counts() -> None:
    """4 x 4 comes before 1 x 32 by its first axis, but holds less."""
    assert profiles_of(samples((4, 4), (1, 32)))["x"].common == (1, 32)


def test_refuses_another_number_of_axes() -> None:
    with pytest.raises(UsageError, match="input x has different numbers of axes"):
        profiles_of(samples((1, 2), (1, 2, 3)))


@pytest.mark.parametrize(
    ("text", "name", "shapes"),
    [
        ("ids:1x16..8x128..64x512", "ids", ShapeRange((1, 16), (8, 128), (64, 512))),
        ("a:0:3..3..4", "a:0", ShapeRange((3,), (3,), (4,))),
        ("x:2x3", "x", ShapeRange((2, 3), (2, 3), (2, 3))),
    ],
)
def test_reads_profiles(text: str, name: str, shapes: ShapeRange) -> None:
    assert parse_profile(text) == (name, shapes)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("1x2..3x4..5x6", "is not a name and three shapes"),
        (":1..2..3", "is not a name and three shapes"),
        ("x:1..2", "is not a name and three shapes"),
        ("x:1..b..3", "'b' is not a shape"),
        ("x:1..-2..3", "'-2' is not a shape"),
        ("x:2..1..3", "do not rise"),
        ("x:1..1x2..1x3", "number of axes"),
    ],
)
def test_refuses_other_forms(text: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        parse_profile(text)


_DECODER = """g (int64[1, T] ids, float[1, 2, P, 4] past.0, float[1, 2, P, 4] past.1)
    => (int64[1, T] y) { y = Identity(ids) }"""
_CACHE = ShapeRange((1, 2, 0, 4), (1, 2, 8, 4), (1, 2, 64, 4))


def resolved(profile: dict[str, ShapeRange], past: int) -> dict[str, ShapeRange]:
    def read() -> Iterator[Feeds]:
        cache = np.zeros((1, 2, past, 4), np.float32)
        yield {"ids": np.zeros((1, 5), np.int64), "past.0": cache, "past.1": cache}

    text = _DECODER.replace("past.0", "past_0").replace("past.1", "past_1")
    model = build(text)
    for value in model.graph.inputs:
        value.name = (value.name or "").replace("_", ".")
    request = EngineRequest(Path("m.engine"), EngineOptions(profile=profile), "TensorRT")
    return dict(with_profiles(request, model, Samples("test", False, 1, read)).options.profile)


def test_a_pattern_is_for_all_inputs_that_fit_and_gives_way_to_a_name() -> None:
    own = ShapeRange((1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4))
    found = resolved({"past.1": own, "past.*": _CACHE}, past=0)
    assert found["past.0"] == _CACHE
    assert found["past.1"] == own
    assert found["ids"].common == (1, 5)
    assert set(found) == {"ids", "past.0", "past.1"}


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the model has no input 'present\.\*'"):
        resolved({"present.*": _CACHE}, past=3)


def test_a_cache_that_is_empty_in_all_samples_is_refused() -> None:
    with pytest.raises(UsageError, match=r"input past\.0 is empty in all samples") as caught:
        resolved({}, past=0)
    assert "--profile 'past.0:1x2x0x4..1x2x128x4..1x2x512x4'" in str(caught.value)


def test_a_cache_that_samples_fill_is_taken_from_them() -> None:
    assert resolved({}, past=7)["past.1"].largest == (1, 2, 7, 4)


def test_a_profile_may_keep_a_cache_empty() -> None:
    empty = ShapeRange((1, 2, 0, 4), (1, 2, 0, 4), (1, 2, 0, 4))
    assert resolved({"past.*": empty}, past=0)["past.0"] == empty
