"""What is measured of a model before it is judged."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from qcompiler.calibration.calls import Feeds
from qcompiler.calibration.fidelity import Fidelity, OutputFidelity
from qcompiler.calibration.task_metrics import Scores
from qcompiler.errors import ModelError
from qcompiler.execution.differences import meaning_of
from qcompiler.execution.sessions import Array, Session, open_session
from qcompiler.gate.setting import Opened, Setting


@dataclass(slots=True)
class Figures:
    """What was measured of one model.

    Attributes:
        fidelity: Its outputs against the float model's.
        scores: What it scored, None without a metric.
    """

    fidelity: Fidelity
    scores: Scores | None = None


FIDELITY = {
    "sqnr": ("dB", True, OutputFidelity.sqnr),
    "cosine": ("", True, OutputFidelity.cosine),
    "kl": ("nats", False, OutputFidelity.divergence),
    "agreement": ("share", True, OutputFidelity.agreement),
}
"""Unit, whether more is better, and what gives it."""
OF_DISTRIBUTIONS = ("kl", "agreement")


def measure_outputs(setting: Setting) -> tuple[Scores | None, list[Figures]]:
    """Run the float model and others on all samples.

    The float model runs without the runtime's optimizations, the others as they are shipped, or
    without them where another runtime is going to run them.

    Returns:
        What the float model scored, and the figures of the others.

    Raises:
        ModelError: A model does not have the outputs of the float model.
        TargetError: ONNX Runtime cannot run one of them.
        UsageError: The metric does not fit, or a user's function fails.
    """
    base, others, metric = setting.base, setting.others, setting.metric
    meanings = {value.name or "": meaning_of(value) for value in base.model.graph.outputs}
    inputs = [str(value.name) for value in base.model.graph.inputs]
    found = [Figures(Fidelity(meanings)) for _ in others]
    scored = [_Scored() for _ in (base, *others)]
    task = setting.progress.task("comparing outputs", len(setting.samples))
    with ExitStack() as stack, task as advance:
        sessions = [stack.enter_context(_session(setting, entry)) for entry in (base, *others)]
        _check_outputs([entry.path for entry in others], sessions)
        for call in setting.samples:
            feeds = {name: call[name] for name in inputs if name in call}
            results = [session.run(session.fitting(feeds)) for session in sessions]
            count = _samples_in(feeds)
            for figures, result in zip(found, results[1:], strict=True):
                figures.fidelity.add(results[0], result, count)
            if metric is not None and metric.of_call is not None:
                for entry, result in zip(scored, results, strict=True):
                    entry.add(metric.of_call(call, result))
            advance(1)
        if metric is not None and metric.of_run is not None:
            for entry, session in zip(scored, sessions, strict=True):
                entry.add(metric.of_run(partial(_run, session)))
    for figures, entry in zip(found, scored[1:], strict=True):
        figures.scores = entry.scores()
    return scored[0].scores(), found


def _session(setting: Setting, entry: Opened) -> Session:
    return open_session(
        entry.to_run,
        optimize=setting.native and entry is not setting.base,
        custom_op_libraries=setting.options.custom_op_libraries,
    )


def _run(session: Session, feeds: Feeds) -> dict[str, Array]:
    return session.run(session.fitting(feeds))


@dataclass(slots=True)
class _Scored:
    """Scores, call by call."""

    parts: list[Scores] = field(default_factory=list)

    def add(self, scores: Scores) -> None:
        self.parts.append(scores)

    def scores(self) -> Scores | None:
        if not self.parts:
            return None
        return Scores(
            np.concatenate([part.numerators for part in self.parts]),
            np.concatenate([part.denominators for part in self.parts]),
        )


def _check_outputs(others: Sequence[Path], sessions: Sequence[Session]) -> None:
    for path, session in zip(others, sessions[1:], strict=True):
        for what, wanted, found in (
            ("inputs", sessions[0].input_names, session.input_names),
            ("outputs", sessions[0].output_names, session.output_names),
        ):
            if set(wanted) != set(found):
                message = f"has the {what} {', '.join(found)}, the float model {', '.join(wanted)}"
                hint = "a candidate has inputs and outputs of the same names"
                raise ModelError(message, where=str(path), hint=hint)


def _samples_in(feeds: Feeds) -> int:
    """Return the size that most inputs have on their first axis."""
    sizes = [array.shape[0] for array in feeds.values() if array.ndim]
    return max(sizes, key=sizes.count) if sizes else 1
