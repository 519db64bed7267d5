import numpy as np
import pytest

from qcompiler.execution.latency import Budget
from qcompiler.gate.latency_ratio import SECONDS, Answer, Question, judge_latency


class _Machine:
    """Runs that take what they should, times noise."""

    def __init__(self, ratio: float, noise: float, *, odd: dict[int, float] | None = None) -> None:
        self._ratio = ratio
        self._noise = noise
        self._odd = odd or {}
        self._random = np.random.default_rng(0)
        self.attempts = 0

    def measure(self, budget: Budget) -> list[list[float]]:
        self.attempts += 1
        ratio = self._ratio * self._odd.get(self.attempts, 1.0)
        noise = np.exp(self._noise * self._random.standard_normal((max(40, budget.fewest), 2)))
        return [[0.01 * a, 0.01 * ratio * b] for a, b in noise]


def _judge(machine: _Machine, limit: float = 1.05) -> Answer:
    (answer,) = judge_latency([Question(0, 1, limit)], machine.measure)
    assert answer.attempts == machine.attempts
    return answer


def test_clear_cases_are_quick() -> None:
    fast = _judge(_Machine(1.0, 0.02))
    assert (fast.passed, fast.settled, fast.attempts) == (True, True, 1)
    slow = _judge(_Machine(1.15, 0.02))
    assert (slow.passed, slow.settled, slow.attempts) == (False, True, 2)
    assert slow.timing.ratio == pytest.approx(1.15, rel=0.02)


def test_one_odd_attempt_does_not_fail_a_model() -> None:
    answer = _judge(_Machine(1.0, 0.02, odd={1: 1.12}))
    assert answer.passed
    assert answer.attempts > 1


def test_noise_is_measured_again_and_said() -> None:
    open_case = _judge(_Machine(1.05, 0.2))
    assert not open_case.settled
    assert open_case.attempts == len(SECONDS)
    assert open_case.rounds == 40 * len(SECONDS)
    assert open_case.passed == (open_case.timing.ratio <= 1.05)


def test_repeats() -> None:
    verdicts = []
    for seed in range(20):
        for ratio in (1.0, 1.15):
            machine = _Machine(ratio, 0.1)
            machine._random = np.random.default_rng(seed)
            verdicts.append(_judge(machine).passed == (ratio < 1.05))
    assert all(verdicts)


def test_several_questions_share_the_rounds() -> None:
    def measure(_: Budget) -> list[list[float]]:
        return [[0.02, 0.01, 0.005]] * 30

    answers = judge_latency([Question(0, 1, 0.6), Question(2, 1, 1.05)], measure)
    assert [a.timing.ratio for a in answers] == [0.5, 2.0]
    assert [a.passed for a in answers] == [True, False]
