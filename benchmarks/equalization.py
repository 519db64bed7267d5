"""What equalizing channels and correcting biases does to quantized models, by method.

    python -m benchmarks.equalization                       everything, hours
    python -m benchmarks.equalization --models cifar_cnn,minilm
    python -m benchmarks.equalization --models smollm2_folded --schemes w8a8 --resume
    python -m benchmarks.equalization --models cifar_cnn-redrawn1 --schemes w4a16

Every model comes twice: as it is, and with outlier channels planted that change nothing of what it
computes (`planted`). Latency is not measured and nothing falls back. Up to 8 channels of a value
may stay in float, as by default, but in the arm "plain"; heavy-tailed activations get two terms of
codes, as by default, in the three last arms only. Each arm is scored as ONNX Runtime runs it.
`redrawnN` scales every channel by at most 2 %, which changes nothing but how weights round: what
arms differ by there, from one to the next, is luck.
Results go to benchmarks/results/equalization.json, the tables to equalization.md.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any, Final

from benchmarks.arguments import add_names, add_scoring, benchmark_parser, command_line
from benchmarks.int8_workloads import INT8_WORKLOADS, Int8Workload, write_calls
from benchmarks.markdown_table import MISSING, measured_with, table
from benchmarks.planted import plant_outliers, redraw_rounding
from benchmarks.results_file import Results
from benchmarks.runtime import output_sqnr
from qcompiler import CompileOptions, compile_model
from qcompiler.options import CalibrationOptions, EqualizationOptions
from qcompiler.passes.equalize.equalize_channels import EqualizeChannels
from qcompiler.quant.equalization import EqualizationMethod

PLANTED: Final = "-planted"
REDRAWN: Final = "-redrawn"
DRAWS: Final = tuple(range(1, 9))
MODELS: Final = ("cifar_cnn", "minilm", "smollm2_folded", "smollm2_raw")
SCHEMES: Final = ("w8a8", "w8a8:tensor", "w4a16", "w4a16:b128", "w3a16", "w3a16:b128")

_TWO_TERMS_BELOW: Final = CalibrationOptions("").two_terms_below

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to equalize.

    Attributes:
        method: As the compiler calls it; None leaves the model as it is.
        correct_bias: Whether biases are corrected after it.
        outlier_channels: Channels of a value that may stay in float.
        two_terms: Whether heavy-tailed activations get two terms of codes.
    """

    method: EqualizationMethod | None
    correct_bias: bool = False
    outlier_channels: int = 8
    two_terms: bool = False


METHODS: Final[Mapping[str, Method]] = {
    "plain": Method(None, outlier_channels=0),
    "none": Method(None),
    "smoothquant 0.5": Method(EqualizationMethod.SMOOTHQUANT),
    "smoothquant searched": Method(EqualizationMethod.SMOOTHQUANT_SEARCHED),
    "aweq": Method(EqualizationMethod.AWEQ),
    "awq": Method(EqualizationMethod.AWQ),
    "auto": Method(EqualizationMethod.AUTO),
    "aweq + bias": Method(EqualizationMethod.AWEQ, correct_bias=True),
    "auto + bias": Method(EqualizationMethod.AUTO, correct_bias=True),
    "none + two terms": Method(None, two_terms=True),
    "default unequalized": Method(None, correct_bias=True, two_terms=True),
    "default": Method(EqualizationMethod.AUTO, correct_bias=True, two_terms=True),
}


def measure(
    source: Path, workload: Int8Workload, calls: Path, scheme: str, method: Method, limit: int
) -> Facts:
    """Compile one arm and score it."""
    options = CompileOptions(
        scheme=scheme,
        calibration=CalibrationOptions(
            str(calls),
            outlier_channels=method.outlier_channels,
            two_terms_below=_TWO_TERMS_BELOW if method.two_terms else 0,
        ),
        equalization=EqualizationOptions(method.method),
        correct_bias=method.correct_bias,
        never_slower=False,
        inspect_kernels=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compiled.onnx"
        begin = perf_counter()
        result = compile_model(source, options, output=output)
        seconds = perf_counter() - begin
        score = workload.task.evaluate(output, limit)
        sqnr = output_sqnr(source, output, workload.feeds())
    passes = {record.name: record for record in result.report.passes}
    equalizing = passes.get(EqualizeChannels.name)
    return {
        "score": score[workload.task.metric],
        "sqnr_db": sqnr,
        "seconds": seconds,
        "equalize_seconds": 0.0 if equalizing is None else equalizing.seconds,
        "peak_bytes": result.report.summary.peak_memory_bytes,
        "groups": 0 if equalizing is None else equalizing.rewrites,
    }


def _workload(name: str) -> Int8Workload:
    return INT8_WORKLOADS[re.sub(rf"{PLANTED}$|{REDRAWN}\d+$", "", name)]


def _change(name: str, source: Path, output: Path) -> int:
    """Write the variant of a model that is asked for; return how many channels are scaled."""
    _, redrawn, draw = name.partition(REDRAWN)
    return redraw_rounding(source, output, int(draw)) if redrawn else plant_outliers(source, output)


def float_score(source: Path, workload: Int8Workload, limit: int) -> Facts:
    """Score the model that everything is compared with."""
    return {"score": workload.task.evaluate(source, limit)[workload.task.metric]}


def measure_model(name: str, arguments: argparse.Namespace, results: Results) -> None:
    """Measure all arms of one model that are asked for."""
    workload = _workload(name)
    limit = workload.task.quick if arguments.quick else workload.task.full
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder) / "calls"
        calls.mkdir()
        write_calls(calls, workload.samples())
        source = workload.task.build()
        if name != workload.name:
            changed = Path(folder) / "changed.onnx"
            count = _change(name, source, changed)
            print(f"{name}: {count} channels changed", flush=True)
            source = changed
        record = results.model(name)
        if not (arguments.resume and record["float"]):
            record["float"] = float_score(source, workload, limit)
        print(f"{name} float: {record['float']}", flush=True)
        for scheme in arguments.schemes:
            for label in arguments.methods:
                arm = f"{scheme} {label}"
                if arguments.resume and results.arm(name, arm):
                    continue
                facts = measure(source, workload, calls, scheme, METHODS[label], limit)
                results.put(name, arm, facts)
                print(f"{name} {arm}: {json.dumps(facts)}", flush=True)
    results.markdown.write_text(markdown(results.content), encoding="utf-8")


def markdown(content: Mapping[str, Any]) -> str:
    """Return all tables: one per model, schemes down and methods across; the draws share one."""
    parts = measured_with(content)
    drawn: dict[str, list[Mapping[str, Facts]]] = {}
    for name, record in content["models"].items():
        if REDRAWN in name:
            drawn.setdefault(_workload(name).name, []).append(record["arms"])
            continue
        metric = _workload(name).task.metric
        parts += ["", f"### {name}: {metric} (float {record['float']['score']:.2f})", ""]
        arms = record["arms"]
        parts += table(
            {
                scheme: {label: _cell(arms.get(f"{scheme} {label}")) for label in METHODS}
                for scheme in SCHEMES
                if any(f"{scheme} {label}" in arms for label in METHODS)
            }
        )
    for name, draws in drawn.items():
        parts += ["", f"### {name}: dB, mean and standard deviation of roundings", ""]
        rows = {scheme: _spread(scheme, draws) for scheme in SCHEMES}
        parts += table({scheme: cells for scheme, cells in rows.items() if cells})
    return "\n".join(parts) + "\n"


def _spread(scheme: str, draws: Sequence[Mapping[str, Facts]]) -> dict[str, str]:
    """Return what the draws of each method have in common, and what equalizing by default does."""
    cells = {}
    for label in METHODS:
        arm = f"{scheme} {label}"
        cells[label] = _mean([arms[arm]["sqnr_db"] for arms in draws if arm in arms])
    one, other = f"{scheme} default", f"{scheme} default unequalized"
    pairs = [(arms[one], arms[other]) for arms in draws if one in arms and other in arms]
    cells["gain of default"] = _mean([a["sqnr_db"] - b["sqnr_db"] for a, b in pairs])
    return {label: cell for label, cell in cells.items() if cell != MISSING}


def _mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return MISSING
    return f"{mean(values):.1f} ± {stdev(values):.1f} of {len(values)}"


def _cell(facts: Facts | None) -> str:
    return MISSING if not facts else f"{facts['score']:.2f} ({facts['sqnr_db']:.1f} dB)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = benchmark_parser(__doc__)
    variants = [f"{name}{suffix}" for name in MODELS for suffix in ("", PLANTED)]
    redrawn = [f"{name}{REDRAWN}{draw}" for name in MODELS for draw in DRAWS]
    add_names(parser, "--models", [*variants, *redrawn])
    parser.set_defaults(models=variants)
    add_names(parser, "--schemes", list(SCHEMES))
    add_names(parser, "--methods", list(METHODS))
    add_scoring(parser)
    chosen = parser.parse_args(arguments)
    results = Results(command_line(), chosen.folder, "equalization")
    for name in chosen.models:
        measure_model(name, chosen, results)


if __name__ == "__main__":
    main()
