"""Between which shapes the inputs of an engine vary: from samples, or from the command line."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from qcompiler.calibration.calls import Samples
from qcompiler.errors import UsageError

Shape = tuple[int, ...]
Profiles = Mapping[str, "ShapeRange"]

_MOST_VALUES = 64
_FORM = "write input:1x16..8x128..64x512: smallest, most common and largest shape"


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """Shapes of one input; an engine runs all between the first and the last.

    Attributes:
        smallest: Least extent of every axis.
        common: The shape that the engine is tuned for.
        largest: Greatest extent of every axis.
        values: The same three of what the input holds, for small inputs of integers whose shape
            does not vary: where they decide shapes, such as the number of rounds of a Loop,
            TensorRT wants to know them. Otherwise None.
    """

    smallest: Shape
    common: Shape
    largest: Shape
    values: tuple[Shape, Shape, Shape] | None = None

    def as_lists(self) -> list[list[int]]:
        """Return the three shapes in the order that TensorRT takes them."""
        return [list(self.smallest), list(self.common), list(self.largest)]


def profiles_of(samples: Samples) -> dict[str, ShapeRange]:
    """Return the range of shapes of every input over the calls.

    The common shape is that of most calls; of several, that of most elements.

    Raises:
        UsageError: An input has another number of axes in another call.
    """
    seen: dict[str, Counter[Shape]] = {}
    held: dict[str, Counter[Shape]] = {}
    for feeds in samples:
        for name, values in feeds.items():
            seen.setdefault(name, Counter())[values.shape] += 1
            if values.dtype.kind in "iu" and values.size <= _MOST_VALUES:
                held.setdefault(name, Counter())[tuple(values.reshape(-1).tolist())] += 1
    return {name: _range_of(name, shapes, held.get(name)) for name, shapes in seen.items()}


def _range_of(name: str, shapes: Counter[Shape], held: Counter[Shape] | None) -> ShapeRange:
    if len({len(shape) for shape in shapes}) > 1:
        message = f"input {name} has different numbers of axes in different calls"
        raise UsageError(message, hint="an engine takes one: leave the others out")
    smallest, common, largest = _extremes(shapes)
    fixed = held is not None and len(shapes) == 1 and held.total() == shapes.total()
    return ShapeRange(smallest, common, largest, _extremes(held) if fixed and held else None)


def _extremes(seen: Counter[Shape]) -> tuple[Shape, Shape, Shape]:
    """Return the least number at every position, the most common tuple, and the greatest."""
    positions = list(zip(*seen, strict=True))
    common = max(seen, key=lambda numbers: (seen[numbers], prod(numbers), numbers))
    return tuple(map(min, positions)), common, tuple(map(max, positions))


def parse_profile(text: str) -> tuple[str, ShapeRange]:
    """Read `input:1x16..8x128..64x512`; one shape alone stands for all three.

    Raises:
        UsageError: It has another form, or the shapes do not rise.
    """
    name, colon, ranges = text.rpartition(":")
    parts = ranges.split("..")
    if not colon or not name or len(parts) not in (1, 3):
        message = f"--profile {text!r} is not a name and three shapes"
        raise UsageError(message, hint=_FORM)
    shapes = [_shape(part, text) for part in parts] * (3 if len(parts) == 1 else 1)
    if not _rises(shapes):
        message = f"--profile {text!r}: the shapes do not rise, or differ in their number of axes"
        raise UsageError(message, hint=_FORM)
    smallest, common, largest = shapes
    return name, ShapeRange(smallest, common, largest)


def _shape(text: str, whole: str) -> Shape:
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", text, re.ASCII):
        message = f"--profile {whole!r}: {text!r} is not a shape"
        raise UsageError(message, hint=_FORM)
    return tuple(int(extent) for extent in text.split("x"))


def _rises(shapes: Sequence[Shape]) -> bool:
    return all(
        len(one) == len(other) and all(a <= b for a, b in zip(one, other, strict=True))
        for one, other in pairwise(shapes)
    )
