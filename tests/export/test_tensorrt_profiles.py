"""Ranges of shapes that engines are built for."""

from collections.abc import Iterator

import numpy as np
import pytest

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.errors import UsageError
from qcompiler.export.tensorrt_profiles import ShapeRange, parse_profile, profiles_of


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
