"""Which form of a region is kept, given how long each takes."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from qcompiler.execution.latency import Timing

MARGIN: Final = 0.03
"""A difference that is less than this, or may be chance, decides nothing."""


class Variant(StrEnum):
    """A form in which a region is measured."""

    FLOAT = "float"
    PLANNED = "planned"
    """As it was planned: weights and activations in integers, ranges calibrated."""
    DYNAMIC = "dynamic"
    """Activations quantized with a range that is found at each run."""
    WEIGHTS = "weight-only"
    """Weights in integers, activations in float."""


def choose(timings: Mapping[Variant, Timing]) -> Variant:
    """Return the variant to keep.

    The planned one stays unless another is faster by more than the margin. One that loses to float
    gives way to integer weights if these do not lose, else to float.

    Args:
        timings: Timings relative to float; float and the planned variant must be there.
    """
    best = _fastest(timings)
    if not loses(timings[best]):
        return best
    weights = timings.get(Variant.WEIGHTS)
    return Variant.FLOAT if weights is None or loses(weights) else Variant.WEIGHTS


def loses(timing: Timing) -> bool:
    """Whether a variant is slower than float, by more than the margin and surely."""
    return timing.ratio > 1 + MARGIN and timing.low > 1


def _fastest(timings: Mapping[Variant, Timing]) -> Variant:
    planned = timings[Variant.PLANNED].ratio
    best = Variant.PLANNED
    for variant in (Variant.DYNAMIC, Variant.WEIGHTS):
        timing = timings.get(variant)
        if timing is None or timing.high >= planned:
            continue
        if timing.ratio < min((1 - MARGIN) * planned, timings[best].ratio):
            best = variant
    return best
