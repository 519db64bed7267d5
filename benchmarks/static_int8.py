"""What int8 weights and activations cost and gain on real models, next to everybody else's.

    python -m benchmarks.static_int8                       everything, hours
    python -m benchmarks.static_int8 --quick --metrics quality --models cifar_cnn
    python -m benchmarks.static_int8 --resume --metrics latency --arms w8a8,ort-static:minmax:u8
    python -m benchmarks.static_int8 --peer-python nncf=VENV/bin/python --peer-python ...

Every arm calibrates with the same samples and makes its model in a process of its own, whose
seconds and memory count. A peer may live in a virtual environment of its own, since their
requirements exclude each other; scoring always happens here. A peer that is not installed, or
fails, is reported with its reason.

Each model is scored twice: *natively*, with all of ONNX Runtime's optimizations, as users run it,
and *emulated*, with none, so that Q/DQ nodes run as written: the latter is the quantizer's own
quality, without what integer kernels of this CPU add. Latencies are ratios to the float model,
measured in alternation.

Results go to benchmarks/results/static_int8.json as they come, and the table to static_int8.md;
parts measured at different times are merged when they were measured on the same bytes.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from benchmarks.arm_process import add_process_options, choice, make_model
from benchmarks.int8_arms import ARMS, NOT_INSTALLED, THREADS, Ours
from benchmarks.int8_peers import FAMILIES, Task
from benchmarks.int8_table import markdown, row_text
from benchmarks.int8_workloads import INT8_WORKLOADS, Int8Workload, write_calls
from benchmarks.latency import latency_ratio
from benchmarks.results_file import FOLDER, Results, versions
from benchmarks.runtime import SessionFactory, output_sqnr, session_factory
from benchmarks.weight_stats import digest, file_bytes, op_counts, weight_bytes

_METRICS = ("quality", "latency")
_ERRORS_ONLY = 3

Facts = dict[str, Any]


def executed_ops(path: Path) -> dict[str, int]:
    """Count the ops that ONNX Runtime runs after all its optimizations."""
    with tempfile.TemporaryDirectory(prefix="qcompiler-int8-ops-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.optimized_model_filepath = str(optimized)
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return dict(sorted(op_counts(optimized).items()))


class _Run:
    """One model's arms, measured one after the other."""

    def __init__(
        self, workload: Int8Workload, results: Results, arguments: argparse.Namespace, scratch: Path
    ) -> None:
        self.workload = workload
        self.task = workload.task
        self.results = results
        self.arguments = arguments
        self.metrics: Sequence[str] = arguments.metrics
        self.resume: bool = arguments.resume
        self.items = self.task.quick if arguments.quick else self.task.full
        self.source = self.task.build()
        self.float_session = session_factory(self.source, threads=THREADS)
        self.scratch = scratch
        self.calls = scratch / "calls"
        self.calls.mkdir()

    def prepare(self) -> None:
        """Write the samples, and record the float model's size and scores."""
        record = self.results.model(self.workload.name)["float"]
        record |= {
            "file_bytes": file_bytes(self.source),
            "weight_bytes": weight_bytes(self.source),
            "digest": digest(self.source),
            "metric": self.task.metric,
            "samples": self.workload.samples_are,
            "feeds": self.workload.feeds_are,
            "calls": write_calls(self.calls, self.workload.samples()),
        }
        if "quality" in self.metrics and not self._has_quality(record):
            scores = self.task.evaluate(self.float_session, self.items)
            record["quality"] = {"items": self.items, "full": self.task.full, "float": scores}
        self.results.write()

    def measure_arm(self, name: str) -> None:
        """Make an arm's model and record what was asked about it."""
        old = self.results.arm(self.workload.name, name)
        if self.resume and old.get("versions") == versions() and self._complete(old):
            print(f"{self.workload.name:24} {name:34} as recorded", flush=True)
            return
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            model = Path(folder) / "model.onnx"
            task = Task(self.source, self.calls, model, self.workload.transformer)
            facts = make_model("benchmarks.int8_arms", task, ARMS[name], self.arguments)
            facts["versions"] = versions()
            if "failure" not in facts:
                self._measure(model, facts, old)
        self.results.put(self.workload.name, name, facts)
        print(row_text(self.results.models, self.workload.name, name), flush=True)

    def _measure(self, model: Path, facts: Facts, old: Facts) -> None:
        """Look at a model that was made; what is known of the same bytes is kept."""
        facts["digest"] = digest(model)
        facts["file_bytes"] = file_bytes(model)
        facts["weight_bytes"] = weight_bytes(model)
        if old.get("digest") == facts["digest"]:
            facts |= {key: old[key] for key in _METRICS if key in old}
        try:
            facts["executed"] = executed_ops(model)
            if "quality" in self.metrics and not (self.resume and self._has_quality(facts)):
                facts["quality"] = self._quality(model)
            if "latency" in self.metrics and not (self.resume and "latency" in facts):
                facts["latency"] = self._latency(model)
        # ONNX Runtime's errors have no common base; what it will not run is a result.
        except Exception as error:
            facts["failure"] = f"does not run: {str(error).strip().splitlines()[-1]}"

    def _quality(self, model: Path) -> Facts:
        """Score a model both ways: the task, and the output's SQNR against float."""
        feeds = self.workload.feeds()
        result: Facts = {"items": self.items}
        for mode in ("native", "emulated"):
            candidate = session_factory(model, optimized=mode == "native", threads=THREADS)
            scores = self.task.evaluate(candidate, self.items)
            decibels = output_sqnr(self.float_session, candidate, feeds)
            result[mode] = scores | {"output_sqnr_db": decibels}
        return result

    def _latency(self, model: Path) -> Facts:
        candidate: SessionFactory = session_factory(model, threads=THREADS)
        return {
            case: latency_ratio(self.float_session, candidate, make_feeds())
            for case, make_feeds in self.task.latency.items()
        }

    def _complete(self, record: Facts) -> bool:
        if "failure" in record:
            return not record["failure"].startswith(NOT_INSTALLED)
        return all(
            self._has_quality(record) if metric == "quality" else metric in record
            for metric in self.metrics
        )

    def _has_quality(self, record: Facts) -> bool:
        return bool(record.get("quality", {}).get("items") == self.items)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(INT8_WORKLOADS)
    parser.add_argument("--models", type=choice(names), default=names)
    parser.add_argument("--arms", type=choice(list(ARMS)), default=list(ARMS))
    parser.add_argument("--metrics", type=choice(_METRICS), default=list(_METRICS))
    parser.add_argument("--quick", action="store_true", help="score fewer items of each task")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON already has")
    parser.add_argument("--list", action="store_true", help="print the names of arms, and stop")
    add_process_options(parser, FAMILIES)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder for JSON and table")
    return parser


def main() -> None:
    """Measure, print, and write JSON and Markdown."""
    arguments = _parser().parse_args()
    if arguments.list:
        print("\n".join(ARMS))
        return
    command = ["python -m benchmarks.static_int8", *sys.argv[1:]]
    results = Results(command, arguments.results, "static_int8")
    for name in arguments.models:
        with tempfile.TemporaryDirectory(prefix="qcompiler-int8-") as scratch:
            run = _Run(INT8_WORKLOADS[name], results, arguments, Path(scratch))
            run.prepare()
            for arm in arguments.arms:
                run.measure_arm(arm)
                results.markdown.write_text(_markdown(results.content), encoding="utf-8")
    print(f"wrote {results.path} and {results.markdown}")


def _markdown(content: dict[str, Any]) -> str:
    ours = [name for name, arm in ARMS.items() if isinstance(arm, Ours)]
    return markdown(content, list(ARMS), ours)


if __name__ == "__main__":
    main()
