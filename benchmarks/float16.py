"""What casting models to 16 bits costs, next to ModelOpt's AutoCast.

    python -m benchmarks.float16 --peer-python modelopt=VENV/bin/python      everything, an hour
    python -m benchmarks.float16 --models minilm,minilm-overflow --arms float16,autocast:fp16
    python -m benchmarks.float16 --resume

Models come as they are, and transformers also with channels planted that compute the same and leave
the range of float16 (`planted`). Every arm sees the same calls, keeps the types of inputs and
outputs, and makes its model in a process of its own, whose seconds and memory count.

Outputs are compared with float32 on inputs that no arm has seen, twice, alike for all arms: *as
stored*, in float32 with every value rounded to the type that it has in the graph, without
optimizations; and *as run*, with all of ONNX Runtime's optimizations on a CPU, which computes in
float32 what it has no 16-bit kernel for, so that it hides what overflows. bfloat16 does not run
there.

Engines are built by TensorRT-RTX where it can be imported. Results go to
benchmarks/results/float16.json as they come, and the tables to float16.md.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from benchmarks.arm_process import add_process_options, choice, make_model
from benchmarks.float16_arms import ARMS, FAMILIES
from benchmarks.float16_table import markdown, row_text
from benchmarks.int8_arms import THREADS
from benchmarks.int8_peers import Task
from benchmarks.int8_workloads import INT8_WORKLOADS, Int8Workload, write_calls
from benchmarks.models import smollm2
from benchmarks.planted import plant_overflow
from benchmarks.results_file import FOLDER, Results, versions
from benchmarks.runtime import Array, Feeds, run, session_factory
from benchmarks.weight_stats import bytes_by_type, digest, file_bytes, weight_bytes
from qcompiler.calibration.calls import Samples
from qcompiler.errors import QCompilerError
from qcompiler.execution.narrow_floats import emulated, has_bfloat16
from qcompiler.execution.sessions import open_session
from qcompiler.export.tensorrt_profiles import Profiles, profiles_of
from qcompiler.export.to_tensorrt import EngineOptions, build_engine
from qcompiler.ir.dataflow import all_nodes, is_op
from qcompiler.ir.load import load_model
from qcompiler.ir.shapes import infer_shapes
from qcompiler.passes.lower.cast_measure import Extremes, measure_extremes
from qcompiler.quant.ranges import sqnr_db

OVERFLOW: Final = "-overflow"
_TRANSFORMERS: Final = ("smollm2_folded", "minilm")
MODELS: Final = (
    *(f"{name}{suffix}" for name in _TRANSFORMERS for suffix in ("", OVERFLOW)),
    "cifar_cnn",
    "silero_vad_op18_ifless",
    "silero_vad",
)
_CALLS: Final = 16
_WINDOWS: Final = 8
_TOKENS: Final = 128
"""AutoCast holds all values of all calls at once: 4 windows of 512 tokens exceed 18 GiB."""
_FLOAT16_MAX: Final = 65504
_PROCESSOR: Final = "SM86"
_ENGINE_MEMORY: Final = 8 << 30
_NARROW: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

Facts = dict[str, Any]
Outputs = Sequence[Mapping[str, Array]]


class _Run:
    """One model's arms, measured one after the other."""

    def __init__(
        self, name: str, results: Results, arguments: argparse.Namespace, scratch: Path
    ) -> None:
        self.name = name
        self.workload: Int8Workload = INT8_WORKLOADS[name.removesuffix(OVERFLOW)]
        self.results = results
        self.arguments = arguments
        self.scratch = scratch
        self.source = self.workload.task.build()
        self.planted = 0
        if name.endswith(OVERFLOW):
            planted = scratch / "planted.onnx"
            self.planted = plant_overflow(self.source, planted)
            self.source = planted
        self.calls = scratch / "calls"
        self.calls.mkdir()
        self.feeds = list(self.workload.feeds())
        self.truth: dict[str, Extremes] = {}
        self.expected: Outputs = ()
        self.profile: Profiles = {}

    def prepare(self) -> None:
        """Write the calls, run the float32 model, and record what it is."""
        samples, samples_are = calibration(self.workload)
        count = write_calls(self.calls, samples)
        task = Task(self.source, self.calls, self.scratch, self.workload.transformer)
        self.profile = profiles_of(Samples("calls", False, count, task.samples))
        model = typed(self.source)
        self.truth = measure_extremes(model, _samples(self.feeds), lambda _: None, threads=THREADS)
        self.expected = stored_outputs(model, self.feeds)
        self.results.model(self.name)["float"] |= {
            "calls": count,
            "samples": samples_are,
            "feeds": self.workload.feeds_are,
            "digest": digest(self.source),
            "file_bytes": file_bytes(self.source),
            "weight_bytes": weight_bytes(self.source),
            "planted": self.planted,
            "out_of_float16": sum(each.peak > _FLOAT16_MAX for each in self.truth.values()),
            "values": len(self.truth),
            **node_counts(model),
        }
        self.results.write()

    def measure_arm(self, name: str) -> None:
        """Make an arm's model and record all about it."""
        old = self.results.arm(self.name, name)
        if self.arguments.resume and old.get("versions") == versions() and "failure" not in old:
            print(f"{self.name:24} {name:24} as recorded", flush=True)
            return
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            model = Path(folder) / "model.onnx"
            task = Task(self.source, self.calls, model, self.workload.transformer)
            facts = make_model("benchmarks.float16_arms", task, ARMS[name], self.arguments)
            facts["versions"] = versions()
            if "failure" not in facts:
                facts |= self._measure(model)
        self.results.put(self.name, name, facts)
        print(row_text(self.results.models, self.name, name), flush=True)

    def _measure(self, path: Path) -> Facts:
        model = typed(path)
        before = self.results.model(self.name)["float"]
        facts = node_counts(model)
        facts["casts_added"] = facts["casts"] - before["casts"]
        return facts | {
            "digest": digest(path),
            "file_bytes": file_bytes(path),
            "weight_bytes": weight_bytes(path),
            "float32_weight_bytes": bytes_by_type(path).get("FLOAT", 0),
            "as_stored": self._as_stored(model),
            "as_run": {} if has_bfloat16(model) else self._as_run(path),
            "engine": self._engine(path),
        }

    def _as_stored(self, model: ir.Model) -> Facts:
        """Compare with every value rounded as it is stored; count the values that are spoiled."""
        try:
            found = measure_extremes(model, _samples(self.feeds), lambda _: None, threads=THREADS)
            spoiled = {
                name: fault
                for name, extremes in found.items()
                if (fault := extremes.spoils(self.truth.get(name, Extremes())))
            }
            outputs = stored_outputs(model, self.feeds)
        except QCompilerError as error:
            return {"failure": _sentence(error)}
        return compared(self.expected, outputs) | {"spoiled_values": len(spoiled)}

    def _as_run(self, path: Path) -> Facts:
        """Compare as ONNX Runtime runs the file; without reuse of buffers where it must."""
        facts: Facts = {}
        for reuse in (True, False):
            try:
                session = session_factory(path, threads=THREADS, reuse_buffers=reuse)()
                outputs = [run(session, feed) for feed in self.feeds]
                return facts | compared(self.expected, outputs)
            # ONNX Runtime's errors have no common base; what it will not run is a result.
            except Exception as error:
                key = "failure" if not reuse else "failure_with_reuse"
                facts[key] = _sentence(error)
        return facts

    def _engine(self, path: Path) -> Facts:
        """Build an engine for shapes like those of the calls."""
        options = EngineOptions(
            profile=self.profile, capabilities=(_PROCESSOR,), memory_limit=_ENGINE_MEMORY
        )
        try:
            built = build_engine(path, path.with_suffix(".engine"), options)
        except QCompilerError as error:
            return {"failure": _sentence(error)}
        return {
            "bytes": built.size,
            "seconds": built.seconds,
            "layers": built.layers,
            "version": built.version,
            "warnings": len(built.warnings),
        }


def calibration(workload: Int8Workload) -> tuple[Iterable[Feeds], str]:
    """Return the calls that arms see, and what they are; they are few for AutoCast's sake."""
    if workload.name.startswith("smollm2"):
        windows = smollm2.sample_feeds(_WINDOWS, length=_TOKENS)
        return windows, f"windows of {_TOKENS} tokens of passages that are not scored"
    return islice(workload.samples(), _CALLS), f"the first of: {workload.samples_are}"


def typed(path: Path) -> ir.Model:
    """Read a model and find the types of its values, whatever the file says of those inside."""
    model = load_model(path)
    outputs = set(model.graph.outputs)
    for node in all_nodes(model):
        for value in node.outputs:
            if value not in outputs:
                value.type = value.shape = None
    infer_shapes(model)
    return model


def node_counts(model: ir.Model) -> Facts:
    """Count Casts, and the other nodes by what floats they read or make; constants apart.

    Returns:
        `casts`; `float32_nodes`, which read or make float32; `narrow_nodes`, of the rest those
        that read or make 16-bit floats; `nodes`, all but constants and Casts; `untyped`, values of
        which no type is known.
    """
    counts = {"casts": 0, "float32_nodes": 0, "narrow_nodes": 0, "nodes": 0, "untyped": 0}
    for node in all_nodes(model):
        counts["untyped"] += sum(value.type is None for value in node.outputs if value.name)
        if is_op(node, "Cast"):
            counts["casts"] += 1
        elif not is_op(node, "Constant"):
            types = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None}
            counts["nodes"] += 1
            counts["float32_nodes"] += ir.DataType.FLOAT in types
            counts["narrow_nodes"] += ir.DataType.FLOAT not in types and bool(
                types.intersection(_NARROW)
            )
    return counts


def stored_outputs(model: ir.Model, feeds: Sequence[Feeds]) -> Outputs:
    """Run a model in float32 with every value rounded as it is stored, unoptimized."""
    with open_session(emulated(model), optimize=False, threads=THREADS) as session:
        return [session.run(session.fitting(feed)) for feed in feeds]


def compared(expected: Outputs, found: Outputs) -> Facts:
    """Return the least SQNR of any output over all calls, and how many numbers are not finite."""
    signal: dict[str, float] = {}
    error: dict[str, float] = {}
    wrong = 0
    for before, after in zip(expected, found, strict=True):
        for name, truth in before.items():
            if truth.dtype.kind != "f":
                continue
            exact, actual = truth.astype(np.float64), after[name].astype(np.float64)
            wrong += int((np.isfinite(exact) & ~np.isfinite(actual)).sum())
            signal[name] = signal.get(name, 0.0) + float(np.square(exact).sum())
            error[name] = error.get(name, 0.0) + float(np.square(actual - exact).sum())
    least = None if wrong else min(sqnr_db(signal[name], error[name]) for name in signal)
    return {"output_sqnr_db": least, "not_finite": wrong}


def _samples(feeds: Sequence[Feeds]) -> Samples:
    return Samples("inputs that were not seen", False, len(feeds), lambda: iter(map(dict, feeds)))


def _sentence(error: BaseException) -> str:
    """Return the last line of a message, without what it says of folders."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(word for word in lines[-1].split() if not word.startswith("/"))[:300]


def main() -> None:
    """Measure, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=choice(MODELS), default=list(MODELS))
    parser.add_argument("--arms", type=choice(list(ARMS)), default=list(ARMS))
    parser.add_argument("--resume", action="store_true", help="keep what the JSON already has")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder for JSON and table")
    add_process_options(parser, FAMILIES)
    arguments = parser.parse_args()
    command = ["python -m benchmarks.float16", *sys.argv[1:]]
    results = Results(command, arguments.results, "float16")
    for name in arguments.models:
        with tempfile.TemporaryDirectory(prefix="qcompiler-float16-") as scratch:
            measured = _Run(name, results, arguments, Path(scratch))
            measured.prepare()
            for arm in arguments.arms:
                measured.measure_arm(arm)
                text = markdown(results.content, list(ARMS))
                results.markdown.write_text(text, encoding="utf-8")
    print(f"wrote {results.path} and {results.markdown}")


if __name__ == "__main__":
    main()
