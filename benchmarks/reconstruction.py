"""What choosing codes by what they compute does to models, by method and by ingredient.

    python -m benchmarks.reconstruction                       everything, a day without a GPU
    python -m benchmarks.reconstruction --models smollm2_folded --schemes w2a16:b64 --device cuda
    python -m benchmarks.reconstruction --arms gptq,"cbq 2/1" --seeds 3 --calls 32 --resume

`cbq W/O` has windows of W layers that share O; the arms after them are `cbq 2/1` with one thing
other. What calibrates is not scored. SmolLM2's output layer, and with it the embedding that it is
tied to, stays in float, as it does in publications and with other tools. Latency is not measured,
nothing falls back, and channels are equalized only where the arm says by what. Each arm is scored
as ONNX Runtime runs it; with `--device`, where nothing but weights is quantized, as PyTorch runs it
there. Results go to benchmarks/results/reconstruction.json, the tables to reconstruction.md.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

from benchmarks.arguments import add_names, add_scoring, benchmark_parser, command_line
from benchmarks.int8_workloads import INT8_WORKLOADS, Int8Workload, write_calls
from benchmarks.markdown_table import MISSING, measured_with, table
from benchmarks.models import smollm2
from benchmarks.results_file import Results
from benchmarks.runtime import Feeds, output_sqnr, session_factory
from benchmarks.torch_session import source_on
from qcompiler import CompileOptions, compile_model
from qcompiler.options import CalibrationOptions, EqualizationOptions, Reconstruction
from qcompiler.quant.equalization import EqualizationMethod
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.reconstruction import (
    PRESETS,
    BlockReconstruction,
    Compute,
    Learned,
    Preset,
    Rounding,
    Start,
)

MODELS: Final[Mapping[str, tuple[str, ...]]] = {
    "smollm2_folded": (
        *("w4a16", "w4a16:b128", "w4a16:b32", "w3a16", "w3a16:b128"),
        *("w2a16", "w2a16:b64", "w8a8", "w4a8", "w4a4"),
    ),
    "minilm": ("w4a16", "w3a16", "w2a16", "w2a16:b64", "w8a8", "w4a8"),
    "cifar_cnn": ("w4a16", "w3a16", "w2a16", "w8a8", "w4a4", "w3a4", "w2a8"),
}
EMULATED: Final = ("w4a8", "w4a4", "w3a4", "w2a8")
"""Schemes that nothing here multiplies: computed in float between real roundings."""
SCHEMES: Final = tuple(dict.fromkeys(scheme for some in MODELS.values() for scheme in some))

WEIGHTS_ALONE: Final = tuple(scheme for scheme in SCHEMES if "a16" in scheme)

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to choose codes.

    Attributes:
        reconstruct: As the compiler calls it.
        weight_range: How the start's scales are chosen.
        changes: Fields of `BlockReconstruction` that are not those of the preset.
        equalize: How channels are equalized before.
    """

    reconstruct: Reconstruction
    weight_range: RangeMethod = RangeMethod.WEIGHTED_MSE
    changes: Mapping[str, Any] = field(default_factory=dict)
    equalize: EqualizationMethod | None = None


def _cbq(**changes: Any) -> Arm:
    return Arm(Reconstruction.CBQ, changes=changes)


ARMS: Final[Mapping[str, Arm]] = {
    "nearest min-max": Arm(Reconstruction.NONE, RangeMethod.MIN_MAX),
    "nearest": Arm(Reconstruction.NONE),
    "gptq": Arm(Reconstruction.GPTQ),
    "cbq 1/0": _cbq(window=1, overlap=0),
    "cbq 2/0": _cbq(window=2, overlap=0),
    "cbq 2/1": _cbq(window=2, overlap=1),
    "cbq 4/2": _cbq(window=4, overlap=2),
    "from nearest": _cbq(start=Start.NEAREST),
    "step sizes": _cbq(learned=Learned.STEP_SIZES),
    "codes": _cbq(scale_rate=0.0),
    "fixed activations": _cbq(activation_rate=0.0),
    "rank 5": _cbq(learned=Learned.LORA),
    "rank 32": _cbq(learned=Learned.LORA, rank=32),
    "soft": _cbq(rounding=Rounding.SOFT),
    "kl": _cbq(kl=1.0),
    "homologous": _cbq(homologous=True),
    "kl + homologous": _cbq(kl=1.0, homologous=True),
    "logits": _cbq(logits=True),
    "smallest blocks": _cbq(layers=False),
    "bfloat16": _cbq(compute=Compute.BFLOAT16),
    "288 steps": _cbq(steps=PRESETS[Preset.BEST].steps),
    **{
        f"{how.value}, {method.value}": Arm(how, equalize=method)
        for how in (Reconstruction.GPTQ, Reconstruction.CBQ)
        for method in (EqualizationMethod.AUTO, EqualizationMethod.CFP)
    },
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What all arms have in common.

    Attributes:
        how: Of the preset, with what the command line says.
        device: Where PyTorch computes.
        calls: Folder of calls.
        limit: Items that are scored.
    """

    how: BlockReconstruction
    device: str
    calls: Path
    limit: int


def measure(source: Path, workload: Int8Workload, scheme: str, arm: Arm, common: Settings) -> Facts:
    """Compile one arm and score it."""
    options = CompileOptions(
        scheme=scheme,
        exclude=workload.task.same_nodes_exclude or (),
        target="emulation" if scheme in EMULATED else "onnxruntime",
        calibration=CalibrationOptions(str(common.calls)),
        equalization=EqualizationOptions(arm.equalize),
        correct_bias=False,
        weight_range=arm.weight_range,
        reconstruct=arm.reconstruct,
        blocks=replace(common.how, **arm.changes),
        device=common.device,
        never_slower=False,
        inspect_kernels=False,
        compare=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compiled.onnx"
        begin = perf_counter()
        report = compile_model(source, options, output=output).report
        seconds = perf_counter() - begin
        if scheme in WEIGHTS_ALONE:
            reference, compiled = (source_on(path, common.device) for path in (source, output))
        else:
            # Integer kernels have no 4-bit activations, but are put in for them.
            reference = source
            compiled = session_factory(output, optimized=scheme not in EMULATED)
        score = workload.task.evaluate(compiled, common.limit)
        sqnr = output_sqnr(reference, compiled, workload.feeds())
    windows = report.windows
    return {
        "score": score[workload.task.metric],
        "sqnr_db": sqnr,
        "seconds": seconds,
        "window_seconds": median([w.seconds for w in windows]) if windows else 0.0,
        "windows": len(windows),
        "windows_kept": sum(window.kept for window in windows),
        "flipped": sum(w.flipped for w in windows) / max(1, sum(w.codes for w in windows)),
        "peak_bytes": max([report.summary.peak_memory_bytes, *(w.peak_bytes for w in windows)]),
    }


def _calls(workload: Int8Workload, count: int | None) -> Sequence[Feeds]:
    """Return the calls to learn from: for SmolLM2 as many windows of 512 tokens as are wanted."""
    if count is not None and workload.name.startswith("smollm2"):
        return smollm2.sample_feeds(count, length=smollm2.CONTEXT)
    return list(itertools.islice(workload.samples(), count))


def measure_model(name: str, arguments: argparse.Namespace, results: Results) -> None:
    """Measure all arms of one model that are asked for."""
    workload = INT8_WORKLOADS[name]
    how = PRESETS[Preset(arguments.preset)]
    said = {key: getattr(arguments, key) for key in ("steps", "batch")}
    how = replace(how, **{key: value for key, value in said.items() if value is not None})
    limit = workload.task.quick if arguments.quick else workload.task.full
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder)
        write_calls(calls, _calls(workload, arguments.calls))
        source = workload.task.build()
        record = results.model(name)
        if not (arguments.resume and record["float"]):
            score = workload.task.evaluate(source, limit)
            record["float"] = {"score": score[workload.task.metric]}
        schemes = [scheme for scheme in MODELS[name] if scheme in arguments.schemes]
        for scheme, label, seed in itertools.product(
            schemes, arguments.arms, range(arguments.first_seed, arguments.seeds)
        ):
            learns = ARMS[label].reconstruct is Reconstruction.CBQ
            key = f"{scheme} {label} seed {seed}"
            if (seed and not learns) or (arguments.resume and results.arm(name, key)):
                continue
            common = Settings(replace(how, seed=1000 * seed), arguments.device, calls, limit)
            facts = measure(source, workload, scheme, ARMS[label], common)
            facts |= {"steps": how.steps, "batch": how.batch, "device": arguments.device}
            results.put(name, key, facts)
            print(f"{name} {key}: {json.dumps(facts)}", flush=True)
    results.markdown.write_text(markdown(results.content), encoding="utf-8")


def markdown(content: Mapping[str, Any]) -> str:
    """Return all tables: one per model, arms down and schemes across; medians over seeds."""
    parts = measured_with(content)
    for name, record in content["models"].items():
        metric = INT8_WORKLOADS[name].task.metric
        parts += ["", f"### {name}: {metric} (float {record['float']['score']:.2f}), minutes", ""]
        arms = record["arms"]
        parts += table(
            {
                label: {scheme: _cell(_seeds(arms, scheme, label)) for scheme in MODELS[name]}
                for label in ARMS
                if any(_seeds(arms, scheme, label) for scheme in MODELS[name])
            }
        )
    return "\n".join(parts) + "\n"


def _seeds(arms: Mapping[str, Facts], scheme: str, label: str) -> list[Facts]:
    return [facts for key, facts in arms.items() if key.startswith(f"{scheme} {label} seed ")]


def _cell(seeds: Sequence[Facts]) -> str:
    if not seeds:
        return MISSING
    scores = [facts["score"] for facts in seeds]
    spread = f" ({min(scores):.2f}..{max(scores):.2f})" if len(scores) > 1 else ""
    minutes = median(facts["seconds"] for facts in seeds) / 60
    return f"{median(scores):.2f}{spread}, {minutes:.1f} min"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = benchmark_parser(__doc__)
    add_names(parser, "--models", list(MODELS))
    add_names(parser, "--schemes", list(SCHEMES))
    add_names(parser, "--arms", list(ARMS))
    parser.add_argument("--preset", choices=[str(preset) for preset in Preset], default="default")
    parser.add_argument("--steps", type=int, help="In place of the preset's.")
    parser.add_argument("--batch", type=int, help="Calls in a step, in place of the preset's.")
    parser.add_argument("--calls", type=int, help="Calls to learn from.")
    parser.add_argument("--seeds", type=int, default=1, help="Runs of each arm that learns.")
    parser.add_argument("--first-seed", type=int, default=0, help="To go on with others.")
    parser.add_argument("--device", default="cpu", help="Where PyTorch computes.")
    add_scoring(parser)
    chosen = parser.parse_args(arguments)
    results = Results(command_line(), chosen.folder, "reconstruction")
    for name in chosen.models:
        measure_model(name, chosen, results)


if __name__ == "__main__":
    main()
