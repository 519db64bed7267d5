"""Where interpolation finds its samples along one axis (ONNX operators, Resize).

All of it follows from sizes and is computed on the host. Places between elements are computed in
float32, as runtimes do: what lies halfway is then rounded as they round it.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
TORCH_CUBIC_COEFFICIENT: Final = -0.75
CROP: Final = "tf_crop_and_resize"
ROUNDINGS: Final = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil", "towards_more")
COORDINATES: Final = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    CROP,
)


@dataclass(frozen=True, slots=True)
class Axis:
    """What becomes of one axis.

    Attributes:
        place: Which axis.
        size: Elements before.
        count: Elements after.
        scale: As the node says; `count` may be rounded.
        start: Where the region of interest begins, as a part of the axis.
        end: Where it ends.
    """

    place: int
    size: int
    count: int
    scale: float
    start: float = 0.0
    end: float = 1.0

    @property
    def stays(self) -> bool:
        """Whether every element is its own sample."""
        whole = self.start == 0 and self.end == 1
        return whole and self.count == self.size and math.isclose(self.scale, 1.0)

    @property
    def is_exact(self) -> bool:
        """Whether the scale leads to a whole number of elements."""
        return math.isclose(self.size * self.scale, self.count, rel_tol=1e-6)

    @property
    def length(self) -> float:
        """Elements after, before any rounding."""
        return self.count if self.is_exact else self.size * self.scale


@dataclass(frozen=True, slots=True)
class Rules:
    """How elements are sampled: the attributes of Resize.

    The rounding "towards_more" is that of the first Resize, which had no attribute for it: down
    where there are more elements than before, up where there are fewer.
    """

    mode: str
    coordinates: str
    rounding: str = "floor"
    cubic_coefficient: float = TORCH_CUBIC_COEFFICIENT
    excludes_outside: bool = False
    antialias: bool = False
    outside: float = 0.0


def places_of(axis: Axis, rules: Rules) -> Floats:
    """Return where each output element lies between the input elements."""
    steps = np.arange(axis.count, dtype=np.float32)
    scale, last = np.float32(axis.scale), np.float32(axis.size - 1)
    half = np.float32(0.5)
    match rules.coordinates:
        case "asymmetric":
            places = steps / scale
        case "align_corners":
            # A broken number of elements is not rounded here: the standard's tests have it so.
            places = steps * last / np.float32(axis.length - 1) if axis.length != 1 else 0 * steps
        case "pytorch_half_pixel" if axis.count == 1:
            places = 0 * steps
        case "half_pixel_symmetric":
            adjustment = np.float32(axis.count) / (scale * np.float32(axis.size))
            margin = np.float32(axis.size / 2) * (1 - adjustment)
            places = margin + (steps + half) / scale - half
        case "tf_crop_and_resize" if axis.count == 1:
            # The middle of the region.
            places = 0 * steps + np.float32(axis.start + axis.end) * last * half
        case "tf_crop_and_resize":
            region = np.float32(axis.end - axis.start) * last / np.float32(axis.count - 1)
            places = np.float32(axis.start) * last + steps * region
        case _:
            places = (steps + half) / scale - half
    return places.astype(np.float64)


def nearest_samples(axis: Axis, rules: Rules) -> Integers:
    """Return which element each output element is a copy of."""
    places = places_of(axis, rules)
    match rules.rounding:
        case "round_prefer_floor":
            rounded = np.ceil(places - 0.5)
        case "round_prefer_ceil":
            rounded = np.floor(places + 0.5)
        case "ceil":
            rounded = np.ceil(places)
        case "towards_more" if axis.scale < 1:
            rounded = np.ceil(places)
        case _:
            rounded = np.floor(places)
    return rounded.clip(0, axis.size - 1).astype(np.int64)


def weighted_samples(axis: Axis, rules: Rules) -> tuple[Integers, Floats]:
    """Return which elements each output element mixes, and how much of each: [taps, count]."""
    places = places_of(axis, rules)
    # When shrinking, antialiasing widens the kernel to cover every element.
    shrink = min(axis.scale, 1.0) if rules.antialias else 1.0
    radius = 1 if rules.mode == "linear" else 2
    first = math.floor(-radius / shrink) + 1
    indices = np.floor(places)[None, :] + np.arange(first, 2 - first)[:, None]
    distances = np.abs(indices - places) * shrink
    if rules.mode == "linear":
        weights = (1 - distances).clip(0, 1)
    else:
        weights = _cubic(distances, rules.cubic_coefficient)
    if rules.excludes_outside:
        weights = np.where((indices < 0) | (indices >= axis.size), 0, weights)
    total = weights.sum(0)
    weights = weights / np.where(total == 0, 1, total)
    return indices.clip(0, axis.size - 1).astype(np.int64), weights


def _cubic(distances: Floats, a: float) -> Floats:
    """Return Keys' cubic convolution kernel."""
    near = ((a + 2) * distances - (a + 3)) * distances**2 + 1
    far = ((distances - 5) * distances + 8) * distances * a - 4 * a
    return np.where(distances <= 1, near, np.where(distances < 2, far, 0))
