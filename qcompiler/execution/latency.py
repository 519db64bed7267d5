"""How long models take in ONNX Runtime relative to each other, measured in turns."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import ceil, floor, sqrt
from pathlib import Path
from statistics import median
from typing import Final

import onnx_ir as ir

from qcompiler.execution.sessions import Array, open_session

Clock = Callable[[], float]
"""Returns seconds; only differences count."""

_RUNS_A_TURN: Final = 2
"""The shorter counts: what interrupts a run makes it longer, never shorter. On a busy machine the
spread of ratios of regions of 2 ms fell from 7 to 3 %, and their intervals to a third."""
_SPREAD: Final = 0.98
"""Half of the 97.5th percentile of the normal distribution: the order statistics n/2 -+ 0.98
sqrt(n) contain the true median in 19 of 20 cases, whatever the distribution (sign test)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to measure.

    Attributes:
        seconds: Time for all rounds together, the loading of the models not counted.
        fewest: Rounds that are run however long they take.
        most: Rounds after which it is enough.
    """

    seconds: float
    fewest: int = 5
    most: int = 200


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one model takes, rounded as it is written to files.

    Attributes:
        milliseconds: Median time of the first model, times the ratio: of two medians of times,
            either may be that of a busier machine.
        ratio: Median over the rounds of its time relative to the first model's.
        low: Lower end of the interval that contains the true ratio in 19 of 20 cases.
        high: Its upper end.
    """

    milliseconds: float
    ratio: float
    low: float
    high: float


def compare_latency(
    models: Sequence[Path | ir.Model],
    feeds: dict[str, Array],
    budget: Budget,
    *,
    threads: int | None = None,
    custom_op_libraries: Sequence[Path] = (),
) -> tuple[Timing, ...]:
    """Run models in turns on the same inputs, with all optimizations.

    Args:
        models: The models; the first is what the others are compared with.
        feeds: A value for every input of all of them; floats are cast to the types they take.
        budget: How long to measure.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        custom_op_libraries: Shared libraries with the kernels of custom operators.

    Raises:
        TargetError: ONNX Runtime cannot load or run one of them.
    """
    return summarized(
        time_models(models, feeds, budget, threads=threads, custom_op_libraries=custom_op_libraries)
    )


def time_models(
    models: Sequence[Path | ir.Model],
    feeds: dict[str, Array],
    budget: Budget,
    *,
    threads: int | None = None,
    custom_op_libraries: Sequence[Path] = (),
) -> list[list[float]]:
    """Load models and run them in turns; arguments are those of `compare_latency`.

    Returns:
        The seconds of each model, one row a round.

    Raises:
        TargetError: ONNX Runtime cannot load or run one of them.
    """
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(
                open_session(
                    model,
                    optimize=True,
                    threads=threads,
                    in_turns=True,
                    custom_op_libraries=custom_op_libraries,
                )
            )
            for model in models
        ]
        return run_in_turns([partial(s.run, s.fitting(feeds)) for s in sessions], budget)
    raise AssertionError  # an ExitStack swallows nothing here


def run_in_turns(
    runs: Sequence[Callable[[], object]], budget: Budget, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Call functions in turns and return their seconds, one row a round, after a call to warm up.

    Each round begins with another function, so that the load of the machine, which moves slower
    than a round, meets all alike. A turn is two calls in a row, of which the shorter counts.
    """
    for run in runs:
        run()
    rounds: list[list[float]] = []
    started = clock()
    while len(rounds) < budget.fewest or (
        len(rounds) < budget.most and clock() - started < budget.seconds
    ):
        row = [0.0] * len(runs)
        for turn in range(len(runs)):
            index = (turn + len(rounds)) % len(runs)
            row[index] = min(_seconds_of(runs[index], clock) for _ in range(_RUNS_A_TURN))
        rounds.append(row)
    return rounds


def _seconds_of(run: Callable[[], object], clock: Clock) -> float:
    before = clock()
    run()
    return clock() - before


def summarized(rounds: Sequence[Sequence[float]]) -> tuple[Timing, ...]:
    """Return the timing of each function from the seconds of all rounds.

    The ratio is taken round by round: a round in which the machine was busy slows all of it.
    """
    return tuple(_timing(rounds, index) for index in range(len(rounds[0])))


def _timing(rounds: Sequence[Sequence[float]], index: int) -> Timing:
    ratios = sorted(row[index] / row[0] if row[0] > 0 else 1.0 for row in rounds)
    count = len(ratios)
    first = max(0, floor(count / 2 - _SPREAD * sqrt(count)))
    last = min(count - 1, ceil(count / 2 + _SPREAD * sqrt(count)) - 1)
    return Timing(
        milliseconds=round(1e3 * median(row[0] for row in rounds) * median(ratios), 4),
        ratio=round(median(ratios), 4),
        low=round(ratios[first], 4),
        high=round(ratios[last], 4),
    )
