"""What weight-only quantization costs and gains on real models, next to ONNX Runtime's quantizer.

    python -m benchmarks.weight_only                       everything, hours
    python -m benchmarks.weight_only --quick --metrics quality --models smollm2_folded
    python -m benchmarks.weight_only --resume --metrics latency

Each model is made in a process of its own. Quality is measured twice where the kernel is
MatMulNBits: it either rounds activations to 8 bits (what ONNX Runtime's own fusion of Q/DQ graphs
chooses, and what qcompiler ships) or keeps them in float (what ONNX Runtime's quantizer ships). The
latter compares the rounding of weights alone. Latencies are ratios to the float model, measured in
alternation. `same-nodes` arms quantize what the peer can quantize, and nothing else.

Results go to benchmarks/results/weight_only.json as they come, and the table to weight_only.md;
parts measured at different times are merged when they were measured on the same bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from benchmarks.arms import ARMS, THREADS, Arm, Ours
from benchmarks.latency import latency_ratio
from benchmarks.results_file import Results, versions
from benchmarks.runtime import SessionFactory, output_sqnr
from benchmarks.weight_stats import (
    digest,
    file_bytes,
    float_elements,
    weight_bytes,
    with_accuracy_level,
)
from benchmarks.weight_table import markdown, row_text
from benchmarks.workloads import WORKLOADS, Workload

_METRICS = ("quality", "latency")
_LEVELS = {"float_activations": 1, "int8_activations": 4}
_ERRORS_ONLY = 3

Facts = dict[str, Any]


def session(path: Path, level: int) -> SessionFactory:
    """Return a function that opens `path`; Q/DQ products fused to MatMulNBits run at `level`."""

    def open_session() -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    return open_session


def compile_arm(source: Path, output: Path, name: str, workload: Workload) -> Facts:
    """Make an arm's model in a process of its own; return its facts and seconds."""
    command = [sys.executable, "-m", "benchmarks.arms", str(source), str(output), name]
    for pattern in workload.same_nodes_exclude or ():
        command += ["--exclude", pattern]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        child.wait()
        seconds = time.perf_counter() - started
        out.seek(0)
        errors.seek(0)
        if child.returncode:
            reason = errors.read().strip().splitlines()
            return {"failure": reason[-1] if reason else f"exit {child.returncode}"}
        facts: Facts = json.loads(out.read().splitlines()[-1])
    return facts | {"compile": {"seconds": seconds}}


def modes(facts: Facts, arm: Arm) -> tuple[str, ...]:
    """Return how the activations of a model can be computed; the first is as it ships."""
    if isinstance(arm, Ours) and arm.scheme.endswith("dynamic"):
        return ("int8_activations",)
    if not any(kernel.startswith("MatMulNBits") for kernel in facts["kernels"]):
        return ("float_activations",)
    order = ("int8_activations", "float_activations")
    return order if isinstance(arm, Ours) else order[::-1]


def measure_quality(
    workload: Workload, source: Path, candidates: dict[str, SessionFactory], items: int
) -> Facts:
    """Score each way of running a model: the task, and the output's SQNR against float."""
    feeds = workload.feeds()
    reference = session(source, _LEVELS["float_activations"])
    result: Facts = {"items": items}
    for mode, candidate in candidates.items():
        scores = workload.evaluate(candidate, items)
        result[mode] = scores | {"output_sqnr_db": output_sqnr(reference, candidate, feeds)}
    return result


def measure_latency(
    workload: Workload, source: Path, candidates: dict[str, SessionFactory]
) -> Facts:
    """Time each way of running a model against the float model."""
    reference = session(source, _LEVELS["float_activations"])
    return {
        mode: {
            case: latency_ratio(reference, candidate, make_feeds())
            for case, make_feeds in workload.latency.items()
        }
        for mode, candidate in candidates.items()
    }


class _Run:
    """One model's arms, measured one after the other."""

    def __init__(self, workload: Workload, results: Results, arguments: argparse.Namespace) -> None:
        self.workload = workload
        self.results = results
        self.metrics: Sequence[str] = arguments.metrics
        self.resume: bool = arguments.resume
        self.items = workload.quick if arguments.quick else workload.full
        self.source = workload.build()

    def measure_float(self) -> None:
        """Record the float model's size and scores."""
        record = self.results.model(self.workload.name)["float"]
        record |= {
            "file_bytes": file_bytes(self.source),
            "weight_bytes": weight_bytes(self.source),
            "float_elements": float_elements(self.source),
            "digest": digest(self.source),
        }
        if "quality" in self.metrics and not self._has_quality(record):
            scores = self.workload.evaluate(session(self.source, 1), self.items)
            record["quality"] = {"items": self.items, "float_activations": scores}
        record["metric"] = self.workload.metric
        self.results.write()

    def applicable(self, names: Sequence[str]) -> list[str]:
        """Return the arms that mean something for this model."""
        if self.workload.same_nodes_exclude is not None:
            return list(names)
        return [name for name in names if not name.endswith("/same-nodes")]

    def measure_arm(self, name: str) -> None:
        """Make an arm's model and record what was asked about it."""
        old = self.results.arm(self.workload.name, name)
        if self.resume and old.get("versions") == versions() and self._complete(old):
            print(f"{self.workload.name:24} {name:34} as recorded", flush=True)
            return
        with tempfile.TemporaryDirectory(prefix="qcompiler-weight-only-") as folder:
            model = Path(folder) / "model.onnx"
            facts = compile_arm(self.source, model, name, self.workload)
            facts["versions"] = versions()
            if old.get("digest") == facts.get("digest"):
                facts = {key: old[key] for key in _METRICS if key in old} | facts
            if facts.get("quantized_elements"):
                candidates = _candidates(model, modes(facts, ARMS[name]))
                if "quality" in self.metrics and not (self.resume and self._has_quality(facts)):
                    facts["quality"] = measure_quality(
                        self.workload, self.source, candidates, self.items
                    )
                if "latency" in self.metrics and not (self.resume and "latency" in facts):
                    facts["latency"] = measure_latency(self.workload, self.source, candidates)
        self.results.put(self.workload.name, name, facts)
        print(row_text(self.results.models, self.workload.name, name), flush=True)

    def _complete(self, record: Facts) -> bool:
        if not record.get("quantized_elements", 1):
            return True
        return all(
            self._has_quality(record) if metric == "quality" else metric in record
            for metric in self.metrics
        )

    def _has_quality(self, record: Facts) -> bool:
        return bool(record.get("quality", {}).get("items") == self.items)


def _candidates(model: Path, names: Sequence[str]) -> dict[str, SessionFactory]:
    """Return how to open a model in each mode; the first opens the file as it is."""
    first, *others = names
    found = {first: session(model, _LEVELS[first])}
    for mode in others:
        level = _LEVELS[mode]
        found[mode] = session(with_accuracy_level(model, level), level)
    return found


def _choice(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            message = f"no such name: {', '.join(unknown)}; there are {', '.join(known)}"
            raise argparse.ArgumentTypeError(message)
        return names

    return parse


def main() -> None:
    """Measure, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=_choice(list(WORKLOADS)), default=list(WORKLOADS))
    parser.add_argument("--arms", type=_choice(list(ARMS)), default=list(ARMS))
    parser.add_argument("--metrics", type=_choice(_METRICS), default=list(_METRICS))
    parser.add_argument("--quick", action="store_true", help="score fewer items of each task")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON already has")
    parser.add_argument("--list", action="store_true", help="print the names of arms, and stop")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(ARMS))
        return
    results = Results(["python -m benchmarks.weight_only", *sys.argv[1:]])
    for name in arguments.models:
        run = _Run(WORKLOADS[name], results, arguments)
        run.measure_float()
        for arm in run.applicable(arguments.arms):
            run.measure_arm(arm)
            results.markdown.write_text(markdown(results.content), encoding="utf-8")
    print(f"wrote {results.path} and {results.markdown}")


if __name__ == "__main__":
    main()
