"""Whether one model takes more than so many times as long as another, in spite of noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from qcompiler.execution.latency import Budget, Timing, summarized

Measure = Callable[[Budget], list[list[float]]]
"""Loads the models anew and runs them in turns; returns their seconds, one row a round."""

SECONDS: Final = (2.0, 2.0, 4.0, 8.0, 8.0)
"""Time of each attempt, the loading of the models not counted."""
_FEWEST: Final = 15
_CONFIRMED: Final = 2
"""Attempts that must say "too slow" before a model is: sessions loaded anew may differ by a few
percent from each other, which no interval within one of them knows."""


@dataclass(frozen=True, slots=True)
class Question:
    """A bound on the ratio of the times of two models.

    Attributes:
        reference: Index of the model that is divided by.
        model: Index of the one that is judged.
        limit: The largest ratio allowed.
    """

    reference: int
    model: int
    limit: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What was measured for a question.

    Attributes:
        timing: Over all attempts.
        passed: Whether the ratio is within its bound, as far as was seen.
        settled: Whether noise is too small to turn that.
        attempts: How often the models were loaded and measured.
        rounds: In how many rounds all in all.
    """

    timing: Timing
    passed: bool
    settled: bool
    attempts: int
    rounds: int


def judge_latency(questions: Sequence[Question], measure: Measure) -> list[Answer]:
    """Measure until noise can turn no answer any more, or for as long as `SECONDS` allow.

    A model passes once the whole interval of its ratio is within the bound. It fails once the
    whole interval is beyond, and was in two attempts. What is still open in the end is judged by
    the median, and says that it is open.
    """
    pools: list[list[list[float]]] = [[] for _ in questions]
    slow = [0] * len(questions)
    answers: list[Answer] = []
    for attempt, seconds in enumerate(SECONDS, start=1):
        rows = measure(Budget(seconds, fewest=_FEWEST))
        for index, question in enumerate(questions):
            pairs = [[row[question.reference], row[question.model]] for row in rows]
            pools[index] += pairs
            slow[index] += summarized(pairs)[1].low > question.limit
        answers = [
            _answer(question, pool, seen, attempt)
            for question, pool, seen in zip(questions, pools, slow, strict=True)
        ]
        if all(answer.settled for answer in answers):
            break
    return answers


def _answer(question: Question, pool: list[list[float]], slow: int, attempts: int) -> Answer:
    timing = summarized(pool)[1]
    within = timing.high <= question.limit
    beyond = timing.low > question.limit and slow >= _CONFIRMED
    passed = within or (not beyond and timing.ratio <= question.limit)
    return Answer(timing, passed, within or beyond, attempts, len(pool))
