"""What models cost: time and memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from qcompiler.bounds import Gate
from qcompiler.errors import UsageError
from qcompiler.execution.latency import time_models
from qcompiler.execution.process_memory import memory_to_run
from qcompiler.gate.latency_ratio import Answer, Question, judge_latency
from qcompiler.gate.setting import Opened, Setting

MAX_LATENCY = "max_latency"
NO_SLOWER = "no worse: latency"


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured; nothing that no bound asks for.

    Attributes:
        limits: The largest ratio that each bound on latency allows.
        answers: What was found for it.
        inputs: The shapes it was measured on, for people.
        memory: Bytes to load and run a model, by the model's path.
    """

    limits: Mapping[str, float]
    answers: Mapping[str, Answer]
    inputs: str
    memory: Mapping[str, int]

    def memory_of(self, model: Opened | None) -> int | None:
        """Return the bytes of a model, None if they were not measured."""
        return None if model is None else self.memory.get(str(model.path))


def measure_costs(setting: Setting) -> Costs:
    """Measure what bounds and the last release ask for, on the largest call.

    Raises:
        TargetError: ONNX Runtime cannot run a model.
        UsageError: They ask for what ONNX Runtime cannot measure here.
    """
    if not setting.native:
        refuse_costs(setting.gate, "ONNX Runtime has no kernels for bfloat16 on a CPU")
        return Costs({}, {}, "", {})
    questions = _questions(setting)
    models = _weighed(setting)
    if not questions and not models:
        return Costs({}, {}, "", {})
    feeds = setting.largest_feeds()
    options = setting.options
    memory: dict[str, int] = {}
    with setting.progress.task("measuring memory", len(models)) as advance:
        for entry in models:
            memory[str(entry.path)] = memory_to_run(
                entry.path,
                feeds,
                threads=options.threads,
                custom_op_libraries=options.custom_op_libraries,
            )
            advance(1)
    answers: list[Answer] = []
    if questions:
        measure = partial(
            time_models,
            [entry.path for entry in (setting.base, *setting.others)],
            feeds,
            threads=options.threads,
            custom_op_libraries=options.custom_op_libraries,
        )
        with setting.progress.task("measuring latency", 1) as advance:
            answers = judge_latency(list(questions.values()), measure)
            advance(1)
    limits = {name: question.limit for name, question in questions.items()}
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
    return Costs(limits, dict(zip(questions, answers, strict=True)), shapes, memory)


def refuse_costs(gate: Gate, reason: str) -> None:
    """Refuse bounds on what this runtime cannot measure; releases are then compared without.

    Raises:
        UsageError: The gate has such a bound.
    """
    for bound in (MAX_LATENCY, "max_memory"):
        if getattr(gate, bound) is not None:
            message = f"{bound} cannot be measured here: {reason}"
            raise UsageError(message, where="gate", hint="leave it out")


def _questions(setting: Setting) -> dict[str, Question]:
    allowed = 1 + setting.gate.tolerances.latency
    found: dict[str, Question] = {}
    if setting.gate.max_latency is not None:
        found[MAX_LATENCY] = Question(0, 1, setting.gate.max_latency)
    recorded = None if setting.recorded is None else setting.recorded.measured.get("latency")
    if setting.released is not None:
        found[NO_SLOWER] = Question(2, 1, allowed)
    elif recorded is not None:
        found[NO_SLOWER] = Question(0, 1, recorded * allowed)
    return found


def _weighed(setting: Setting) -> list[Opened]:
    """Return the models whose memory is measured."""
    limit = setting.gate.max_memory
    if setting.released is not None:
        wanted = [setting.candidate, setting.released]
    elif limit is not None or (setting.recorded and "memory" in setting.recorded.measured):
        wanted = [setting.candidate]
    else:
        wanted = []
    return [*([] if limit is None or isinstance(limit, str) else [setting.base]), *wanted]
