"""Latency of a model relative to another, measured in alternation."""

import time
from collections.abc import Callable
from statistics import median

from benchmarks.runtime import Feeds, ModelSource, open_session

_WARM_UP_RUNS = 3
_SECONDS = 4.0
_ROUNDS = (15, 200)
"""Fewest and most rounds; between them, as many as fit into the time."""


def latency_ratio(
    reference: ModelSource, candidate: ModelSource, feeds: Feeds, seconds: float = _SECONDS
) -> dict[str, float]:
    """Run two models in turns on the same inputs.

    Returns:
        What `in_turns` returns.
    """
    before, after = open_session(reference), open_session(candidate)
    return in_turns(lambda: before.run(None, feeds), lambda: after.run(None, feeds), seconds)


def in_turns(
    reference: Callable[[], object],
    candidate: Callable[[], object],
    seconds: float = _SECONDS,
    fewest: int = _ROUNDS[0],
) -> dict[str, float]:
    """Time two functions in turns, for some seconds and at least `fewest` rounds.

    Every round runs both, the first of them changing, so that the load of the machine, which moves
    slower than a round, meets both alike.

    Returns:
        `ratio`, the median of the rounds' ratios candidate / reference; `ratio_low` and
        `ratio_high`, their quartiles; `milliseconds` and `float_milliseconds`, the median times;
        `rounds`.
    """
    both = (reference, candidate)
    for run in both:
        for _ in range(_WARM_UP_RUNS):
            run()
    times: list[tuple[float, float]] = []
    started = time.perf_counter()
    while _goes_on(len(times), time.perf_counter() - started, seconds, fewest):
        first, second = both if len(times) % 2 == 0 else both[::-1]
        pair = (_time(first), _time(second))
        times.append(pair if len(times) % 2 == 0 else pair[::-1])
    ratios = sorted(after / before for before, after in times)
    quarter = len(ratios) // 4
    return {
        "ratio": median(ratios),
        "ratio_low": ratios[quarter],
        "ratio_high": ratios[-1 - quarter],
        "milliseconds": 1e3 * median(after for _, after in times),
        "float_milliseconds": 1e3 * median(before for before, _ in times),
        "rounds": float(len(times)),
    }


def _goes_on(rounds: int, spent: float, seconds: float, fewest: int) -> bool:
    return rounds < fewest or (rounds < _ROUNDS[1] and spent < seconds)


def _time(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
