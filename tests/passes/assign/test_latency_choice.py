import pytest

from qcompiler.execution.latency import Timing
from qcompiler.passes.assign.latency_choice import Variant, choose

FLOAT = {Variant.FLOAT: Timing(1.0, 1.0, 1.0, 1.0)}


def sure(ratio: float) -> Timing:
    return Timing(ratio, ratio, ratio, ratio)


@pytest.mark.parametrize(
    ("planned", "dynamic", "weights", "expected"),
    [
        (0.6, None, None, Variant.PLANNED),
        (1.02, None, None, Variant.PLANNED),
        (1.2, None, None, Variant.FLOAT),
        (1.2, None, 1.0, Variant.WEIGHTS),
        (1.2, None, 1.02, Variant.WEIGHTS),
        (1.2, None, 1.1, Variant.FLOAT),
        (0.6, 0.5, 0.7, Variant.DYNAMIC),
        (0.6, 0.59, 0.7, Variant.PLANNED),
        (0.6, 0.5, 0.4, Variant.WEIGHTS),
        (0.6, 0.4, 0.5, Variant.DYNAMIC),
        (1.3, 1.1, 1.2, Variant.FLOAT),
        (1.3, 0.9, 1.2, Variant.DYNAMIC),
        (1.3, 1.1, 1.02, Variant.WEIGHTS),
    ],
)
def test_the_fastest_wins_but_only_by_a_margin(
    planned: float, dynamic: float | None, weights: float | None, expected: Variant
) -> None:
    timings = {**FLOAT, Variant.PLANNED: sure(planned)}
    if dynamic is not None:
        timings[Variant.DYNAMIC] = sure(dynamic)
    if weights is not None:
        timings[Variant.WEIGHTS] = sure(weights)
    assert choose(timings) is expected


def test_what_may_be_chance_decides_nothing() -> None:
    loses_perhaps = Timing(1.3, 1.3, 0.6, 2.2)
    assert choose({**FLOAT, Variant.PLANNED: loses_perhaps}) is Variant.PLANNED
    faster_perhaps = Timing(0.5, 0.5, 0.2, 0.8)
    timings = {**FLOAT, Variant.PLANNED: sure(0.6), Variant.DYNAMIC: faster_perhaps}
    assert choose(timings) is Variant.PLANNED
