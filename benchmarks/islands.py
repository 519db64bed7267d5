"""What islands do to models at few bits, by kind, by measure and by task, at equal average bits.

    python -m benchmarks.islands                       everything, days without a GPU
    python -m benchmarks.islands --models minilm --schemes w2a16:b64 --extra 0.1,0.35
    python -m benchmarks.islands --models smollm2_folded --arms gptq,"column tacq" --resume
    python -m benchmarks.islands --latency --models smollm2_folded

Every arm but `gptq` and its smaller blocks has `--extra` bits per weight more than the scheme
alone: values, indices and padding of islands, counted. SmolLM2's output layer stays in float, and
the embedding that it is tied to; so do MiniLM's embeddings. `task` arms are conditioned on
questions of CommonsenseQA with their answers, and scored on others of them; all arms round on the
same calls. Each seed takes another half of the calls. What calibrates is not scored. With a
`--device` other than the CPU PyTorch scores there, else ONNX Runtime. Results go to
benchmarks/results/islands.json, the tables to islands.md.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final, Self

import numpy as np

from benchmarks.arguments import add_names, add_scoring, benchmark_parser, command_line
from benchmarks.int8_workloads import INT8_WORKLOADS, Int8Workload, write_calls
from benchmarks.latency import latency_ratio
from benchmarks.markdown_table import MISSING, measured_with, table
from benchmarks.models.smollm2_task import score_task, write_task
from benchmarks.results_file import Results
from benchmarks.runtime import Feeds, ModelSource, open_session, output_sqnr
from benchmarks.torch_session import source_on
from qcompiler import CompileOptions, compile_model
from qcompiler.calibration.calls import SampleOptions
from qcompiler.island_map import map_islands
from qcompiler.options import (
    CalibrationOptions,
    EqualizationOptions,
    Reconstruction,
    TaskOptions,
)
from qcompiler.passes.assign.assign_islands import AssignIslands
from qcompiler.quant.islands import IslandBudget, IslandKind, IslandRequest, Saliency

MODELS: Final[Mapping[str, tuple[str, ...]]] = {
    "smollm2_folded": ("w2a16:b64", "w3a16:b128", "w4a16:b128"),
    "minilm": ("w2a16:b64", "w3a16:b64", "w4a16:b64"),
    "cifar_cnn": ("w2a16:b64",),
}
SCHEMES: Final = tuple(dict.fromkeys(scheme for some in MODELS.values() for scheme in some))
WITH_TASK: Final = ("smollm2_folded",)
TABLES: Final[Mapping[str, tuple[str, ...]]] = {"minilm": ("node_embedding*",)}
"""Lookups that stay in float, so that bits per weight are those of products."""
_CONDITIONED: Final = ("commonsense_qa", 128)
"""The task of `task` arms, and of how many questions it is made."""
_SCORED: Final = {"commonsense_qa": 256, "siqa": 256, "spider": 64}
"""Questions that are scored: others than a task is made of."""

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to spend bits.

    Attributes:
        kind: What islands are made of; None has none.
        saliency: By what they are chosen.
        task: Whether they are chosen for questions and answers, rather than for the outputs.
        smaller: By how much blocks are smaller: what uniform quantization does with more bits.
        stored: Whether codes of 3 bits count the 4 that they are stored in.
        learned: Whether codes and scales around the islands are learned (CBQ).
    """

    kind: IslandKind | None = None
    saliency: Saliency = Saliency.TACQ
    task: bool = False
    smaller: int = 1
    stored: bool = False
    learned: bool = False


ARMS: Final[Mapping[str, Arm]] = {
    "gptq": Arm(),
    "gptq, half blocks": Arm(smaller=2),
    "gptq, quarter blocks": Arm(smaller=4),
    **{f"{kind.value} tacq": Arm(kind) for kind in IslandKind},
    **{
        f"weight {measure.value}": Arm(IslandKind.WEIGHT, measure)
        for measure in Saliency
        if measure is not Saliency.TACQ
    },
    **{f"column {m.value}": Arm(IslandKind.COLUMN, m) for m in (Saliency.QAL, Saliency.RANDOM)},
    "block slim": Arm(IslandKind.BLOCK, Saliency.SLIM),
    "node tacq, stored": Arm(IslandKind.NODE, stored=True),
    **{f"{kind.value} tacq, task": Arm(kind, task=True) for kind in IslandKind},
    "cbq": Arm(learned=True),
    "cbq, half blocks": Arm(smaller=2, learned=True),
    **{f"{kind.value} tacq, cbq": Arm(kind, learned=True) for kind in IslandKind},
    **{
        f"{kind.value} tacq, task, cbq": Arm(kind, task=True, learned=True)
        for kind in (IslandKind.WEIGHT, IslandKind.NODE)
    },
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What arms of a model and a seed have in common.

    Attributes:
        source: The float model.
        exclude: What stays in float.
        calls: Folder of calls.
        task: Questions and answers, if the model has a task.
        device: Where PyTorch computes.
    """

    source: Path
    exclude: tuple[str, ...]
    calls: Path
    task: Path | None
    device: str

    @classmethod
    def make(cls, workload: Int8Workload, calls: Path, task: Path | None, device: str) -> Self:
        """Return it for a workload."""
        exclude = (*(workload.task.same_nodes_exclude or ()), *TABLES.get(workload.name, ()))
        return cls(workload.task.build(), exclude, calls, task, device)


@dataclass(frozen=True, slots=True)
class Room:
    """What the weights of a scheme may take.

    Attributes:
        bits: Of a weight, islands included.
        elements: Of all weights.
    """

    bits: float
    elements: int

    def budget(self, *, stored: bool) -> IslandBudget:
        """Return it as the compiler is asked for it."""
        if stored:
            return IslandBudget(nbytes=int(self.bits * self.elements / 8))
        return IslandBudget(average_bits=self.bits)


def options_of(scheme: str, arm: Arm, room: Room, setting: Setting) -> CompileOptions:
    """Return what an arm asks the compiler for."""
    calls, task = setting.calls, setting.task
    head, _, block = scheme.partition(":b")
    scheme = f"{head}:b{int(block) // arm.smaller}" if block else scheme
    islands = None
    if arm.kind is not None:
        islands = IslandRequest(arm.saliency, room.budget(stored=arm.stored), arm.kind)
    source = None
    if arm.task and task is not None:
        tokenizer = task.with_name("tokenizer.json")
        source = TaskOptions(str(task), SampleOptions(tokenizer=tokenizer, max_tokens=384))
    return CompileOptions(
        scheme=scheme,
        exclude=setting.exclude,
        calibration=CalibrationOptions(str(calls)),
        equalization=EqualizationOptions(None),
        reconstruct=Reconstruction.CBQ if arm.learned else Reconstruction.GPTQ,
        islands=islands,
        task=source,
        device=setting.device,
        gradients=calls.with_name(f"{calls.name}-gradients") if arm.kind else None,
        inspect_kernels=False,
        compare=False,
    )


def room_of(scheme: str, setting: Setting) -> Room:
    """Return what the weights of a scheme alone take."""
    request = IslandRequest(Saliency.RANDOM, IslandBudget(fraction=1e-9), IslandKind.COLUMN)
    calibration = CalibrationOptions(str(setting.calls))
    found = map_islands(
        setting.source,
        CompileOptions(
            scheme=scheme,
            exclude=setting.exclude,
            calibration=calibration,
            islands=request,
            equalization=EqualizationOptions(None),
        ),
    )
    return Room(found.average_bits_without, found.weights)


def score(source: ModelSource, workload: Int8Workload, limit: int) -> Facts:
    """Score a model on held-out data, and on its tasks if it has any."""
    facts: Facts = {"score": workload.task.evaluate(source, limit)[workload.task.metric]}
    if workload.name in WITH_TASK:
        session = open_session(source)
        for name, count in _SCORED.items():
            found = score_task(session, name, count)
            facts |= {f"{name} {what}": number for what, number in found.items()}
    return facts


def measure(workload: Int8Workload, options: CompileOptions, limit: int, setting: Setting) -> Facts:
    """Compile one arm and score it."""
    source = setting.source
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compiled.onnx"
        begin = perf_counter()
        result = compile_model(source, options, output=output)
        facts: Facts = {"seconds": perf_counter() - begin}
        compiled = source_on(output, setting.device)
        facts |= score(compiled, workload, limit)
        reference = source_on(source, setting.device)
        facts["sqnr_db"] = output_sqnr(reference, compiled, workload.feeds())
    report = result.report
    passes = {record.name: record for record in report.passes}
    choosing = passes.get(AssignIslands.name)
    facts |= {
        "islands_seconds": 0.0 if choosing is None else choosing.seconds,
        "peak_bytes": report.summary.peak_memory_bytes,
        "stored_bits": report.summary.average_bits,
        "bits": report.summary.average_bits,
    }
    if report.islands is not None:
        facts |= {
            "bits": report.islands.average_bits,
            "share": report.islands.share,
            "concentration": report.islands.concentration,
        }
    return facts


def some_calls(workload: Int8Workload, seed: int, limit: int | None) -> list[Feeds]:
    """Return half of the calls, another half for every seed."""
    calls = list(workload.samples())
    order = np.random.default_rng(seed).permutation(len(calls))
    return [calls[at] for at in sorted(order[: min(limit or len(calls), max(1, len(calls) // 2))])]


def measure_model(name: str, arguments: argparse.Namespace, results: Results) -> None:
    """Measure all arms of one model that are asked for."""
    workload = INT8_WORKLOADS[name]
    limit = workload.task.quick if arguments.quick else workload.task.full
    record = results.model(name)
    if not (arguments.resume and record["float"]):
        source = source_on(workload.task.build(), arguments.device)
        record["float"] = score(source, workload, limit)
    with tempfile.TemporaryDirectory() as folder:
        task = write_task(Path(folder), *_CONDITIONED) if name in WITH_TASK else None
        print(f"{name} float: {record['float']}", flush=True)
        for seed in range(arguments.first_seed, arguments.seeds):
            calls = Path(folder) / f"calls{seed}"
            calls.mkdir()
            calls.with_name(f"{calls.name}-gradients").mkdir()
            write_calls(calls, some_calls(workload, seed, arguments.calls))
            setting = Setting.make(workload, calls, task, arguments.device)
            for scheme in [each for each in MODELS[name] if each in arguments.schemes]:
                alone = room_of(scheme, setting)
                for label, extra in _cells(arguments):
                    key = f"{scheme} {label}{f' +{extra:g}' if extra else ''} seed {seed}"
                    arm = ARMS[label]
                    if (arm.task and task is None) or (arguments.resume and results.arm(name, key)):
                        continue
                    room = replace(alone, bits=alone.bits + extra)
                    options = options_of(scheme, arm, room, setting)
                    facts = measure(workload, options, limit, setting)
                    results.put(name, key, facts)
                    print(f"{name} {key}: {json.dumps(facts)}", flush=True)
    results.markdown.write_text(markdown(results.content), encoding="utf-8")


def _cells(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """Return arms with the bits they may add; arms without islands have none to choose."""
    return [
        (label, extra)
        for label in arguments.arms
        for extra in (arguments.extra if ARMS[label].kind is not None else [0.0])
    ]


def measure_latency(name: str, arguments: argparse.Namespace, results: Results) -> None:
    """Time every kind of island next to uniform 2, 3 and 4 bits and float, one after the other."""
    workload = INT8_WORKLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder) / "calls"
        calls.mkdir()
        calls.with_name(f"{calls.name}-gradients").mkdir()
        write_calls(calls, some_calls(workload, 0, 2))
        block = 64
        setting = Setting.make(workload, calls, None, arguments.device)
        alone, source = room_of(f"w2a16:b{block}", setting), setting.source
        arms = {f"uniform {bits}": (f"w{bits}a16:b{block}", Arm(), 0.0) for bits in (2, 3, 4)}
        for kind in IslandKind:
            for extra in arguments.extra:
                # Where islands lie moves no latency, but for the number of those of a product.
                arm = Arm(kind, Saliency.MAGNITUDE)
                arms[f"{kind.value} +{extra:g}"] = (f"w2a16:b{block}", arm, extra)
        for label, (scheme, arm, extra) in arms.items():
            output = Path(folder) / "compiled.onnx"
            room = replace(alone, bits=alone.bits + extra)
            options = options_of(scheme, arm, room, setting)
            compile_model(source, options, output=output)
            facts = {
                what: latency_ratio(source, output, feeds())
                for what, feeds in workload.task.latency.items()
            }
            results.put(name, f"latency {label}", {"latency": facts})
            print(f"{name} latency {label}: {json.dumps(facts)}", flush=True)
    results.markdown.write_text(markdown(results.content), encoding="utf-8")


def markdown(content: Mapping[str, Any]) -> str:
    """Return all tables: one per model and scheme, arms down; medians over seeds."""
    parts = measured_with(content)
    for name, record in content["models"].items():
        metric = INT8_WORKLOADS[name].task.metric
        for scheme in MODELS[name]:
            rows = _rows(record["arms"], f"{scheme} ")
            if rows:
                truth = ", ".join(f"{key} {value:.3f}" for key, value in record["float"].items())
                parts += ["", f"### {name}, {scheme}: {metric} (float: {truth})", "", *table(rows)]
        timed = {k: v["latency"] for k, v in record["arms"].items() if k.startswith("latency ")}
        if timed:
            parts += ["", f"### {name}: time of a run, float is 1", ""]
            parts += table(
                {
                    label.removeprefix("latency "): {
                        k: f"{v['ratio']:.2f}" for k, v in each.items()
                    }
                    for label, each in timed.items()
                }
            )
    return "\n".join(parts) + "\n"


def _rows(arms: Mapping[str, Facts], prefix: str) -> dict[str, dict[str, str]]:
    groups: dict[str, list[Facts]] = {}
    for key, facts in arms.items():
        if key.startswith(prefix):
            label = key.removeprefix(prefix).rpartition(" seed ")[0]
            groups.setdefault(label, []).append(facts)
    tasks = [f"{task} {what}" for task in _SCORED for what in ("accuracy", "margin", "loss")]
    columns = ("bits", "stored_bits", "score", "sqnr_db", *tasks, "share", "seconds")
    return {
        label: {column: _middle(found, column) for column in columns}
        for label, found in groups.items()
    }


def _middle(found: Sequence[Facts], column: str) -> str:
    numbers = [facts[column] for facts in found if column in facts]
    return f"{median(numbers):.3f}" if numbers else MISSING


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = benchmark_parser(__doc__)
    add_names(parser, "--models", list(MODELS))
    add_names(parser, "--schemes", list(SCHEMES))
    add_names(parser, "--arms", list(ARMS))
    parser.add_argument("--extra", type=_numbers, default=[0.1, 0.35], help="Bits per weight.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="To go on with others.")
    parser.add_argument("--calls", type=int, help="To round on, at most; else half of all.")
    parser.add_argument("--device", default="cpu", help="Where PyTorch computes.")
    parser.add_argument("--latency", action="store_true", help="Time kinds of islands instead.")
    add_scoring(parser)
    chosen = parser.parse_args(arguments)
    results = Results(command_line(), chosen.folder, "islands")
    for name in chosen.models:
        (measure_latency if chosen.latency else measure_model)(name, chosen, results)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
