"""Does the latency gate fail what is as fast as before, and catch what is slower?

The candidate is a copy of the model, or the model with a chain of small matrix products at its
end, as many as make it slower by a given share. Both go through the gate `--repeats` times.

Usage: `python -m benchmarks.latency_gate [--repeats 20] [--slower 0.15] [--limit 1.05]`
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.models import cifar_cnn
from benchmarks.results_file import machine, versions
from benchmarks.runtime import Feeds
from qcompiler.execution.latency import Budget, compare_latency, time_models
from qcompiler.gate.latency_ratio import Answer, Question, judge_latency

_SIZE = 64
"""Rows and columns of the matrices of the chain: 20 microseconds a product."""
_BUDGET = Budget(4.0, fewest=15)
_NEAR = 0.01


def main() -> None:
    """Run the gates and print what they said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--slower", type=float, default=0.15)
    parser.add_argument("--limit", type=float, default=1.05)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base = cifar_cnn.build()
    (feeds,) = cifar_cnn.sample_feeds(1, arguments.batch)
    with TemporaryDirectory() as folder:
        slow = Path(folder) / "slow.onnx"
        steps, ratio = _make_slow(base, slow, feeds, 1 + arguments.slower, arguments.threads)
        print(f"{steps} products make the model {ratio:.3f} times as slow")
        rows = [
            _row(name, repeat, base, candidate, feeds, arguments)
            for repeat in range(arguments.repeats)
            for name, candidate in (("unchanged", base), ("slower", slow))
        ]
    for name, wanted in (("unchanged", True), ("slower", False)):
        found = [row for row in rows if row["model"] == name]
        right = sum(row["passed"] == wanted for row in found)
        settled = sum(row["settled"] for row in found)
        seconds = sum(row["seconds"] for row in found) / len(found)
        print(
            f"{name}: {right} of {len(found)} right, {settled} settled, {seconds:.1f} s on average"
        )
    if arguments.json is not None:
        content = {"machine": machine(), "versions": versions(), "built": ratio, "gates": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _row(
    name: str,
    repeat: int,
    base: Path,
    candidate: Path,
    feeds: Feeds,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    started = time.perf_counter()
    answer = _gate(base, candidate, feeds, arguments.limit, arguments.threads)
    timing = answer.timing
    print(
        f"{repeat:3} {name:9} {'passed' if answer.passed else 'failed'}  {timing.ratio:.3f} "
        f"({timing.low:.3f} to {timing.high:.3f})  {answer.attempts} attempts"
        f"{'' if answer.settled else ', open'}",
        flush=True,
    )
    return {
        "model": name,
        "passed": answer.passed,
        "settled": answer.settled,
        "attempts": answer.attempts,
        "ratio": timing.ratio,
        "low": timing.low,
        "high": timing.high,
        "seconds": time.perf_counter() - started,
    }


def _gate(base: Path, candidate: Path, feeds: Feeds, limit: float, threads: int | None) -> Answer:
    measure = partial(time_models, (base, candidate), feeds, threads=threads)
    (answer,) = judge_latency([Question(0, 1, limit)], measure)
    return answer


def _make_slow(
    base: Path, path: Path, feeds: Feeds, wanted: float, threads: int | None
) -> tuple[int, float]:
    """Write the model with as many products as make it so much slower; return both."""
    steps, ratio = 50, 1.0
    for _ in range(8):
        ir.save(_slowed(ir.load(base), steps), path)
        ratio = compare_latency((base, path), feeds, _BUDGET, threads=threads)[1].ratio
        if abs(ratio - wanted) < _NEAR:
            break
        steps = max(1, round(steps * (wanted - 1) / max(ratio - 1, 0.1 * (wanted - 1))))
    return steps, ratio


def _slowed(model: ir.Model, steps: int) -> ir.Model:
    """Add a chain of products, which starts from the first output and adds nothing to it."""
    graph = model.graph
    output = graph.outputs[0]
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((_SIZE, _SIZE)) / np.sqrt(_SIZE)).astype(np.float32)
    zero, weight = (
        _constant(graph, "zero", np.zeros((), np.float32)),
        _constant(graph, "ballast", matrix),
    )
    mean = _node(graph, "ReduceMean", [output], {"keepdims": 0})
    value = _node(graph, "Add", [weight, mean])
    for _ in range(steps):
        value = _node(graph, "MatMul", [value, weight])
    total = _node(graph, "ReduceMean", [value], {"keepdims": 0})
    result = _node(graph, "Add", [output, _node(graph, "Mul", [total, zero])])
    name, output.name = output.name, f"{output.name}_before"
    result.name, result.type, result.shape = name, output.type, output.shape
    graph.outputs[0] = result
    return model


def _constant(graph: ir.Graph, name: str, values: np.ndarray[Any, Any]) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    value.shape = ir.Shape(values.shape)
    graph.register_initializer(value)
    return value


def _node(
    graph: ir.Graph, op: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None
) -> ir.Value:
    made = ir.convenience.convert_attributes(dict(attributes or {}))
    node = ir.Node("", op, inputs, made, num_outputs=1, name=f"ballast_{len(graph)}")
    node.outputs[0].name = f"{node.name}_output"
    graph.append(node)
    return node.outputs[0]


if __name__ == "__main__":
    main()
