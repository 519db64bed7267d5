"""Models to cast to 16 bits, and what casting did to them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.execution.narrow_floats import emulated
from qcompiler.execution.sessions import open_session
from qcompiler.passes.lower.cast_types import CastTypes, CastTypesOptions
from qcompiler.quant.compute_type import ComputeType
from qcompiler.rewriting.base import PassResult
from tests.support.graphs import (
    random_array,
)
from tests.support.parity import run_model
from tests.support.rewrites import run_pass

F16, BF16, F32 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT
WEIGHT = random_array(32, 32, seed=1) / 6


def samples(*calls: Feeds) -> Samples:
    def read() -> Iterator[Feeds]:
        yield from (dict(call) for call in calls)

    return Samples("test", False, len(calls), read)


def data(*shape: int, scale: float = 1.0, seed: int = 7, name: str = "x") -> Feeds:
    return {name: (random_array(*shape, seed=seed) * scale).astype(np.float32)}


def cast(
    model: ir.Model, folder: Path, *calls: Feeds, kind: str = "float16", **options: Any
) -> PassResult:
    """Run the pass; the model that it leaves must load and pass ONNX's checker."""
    given = samples(*calls) if calls else None
    options.setdefault("samples", given)
    result = run_pass(CastTypes(CastTypesOptions(ComputeType(kind), **options)), model, folder)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    if kind == "float16":
        with open_session(model, optimize=True, threads=1):
            pass
    return result


def worst_error(before: ir.Model, after: ir.Model, feeds: Feeds) -> float:
    """Return the largest error of an output over its largest value, values rounded as stored."""
    expected, found = run_model(before, feeds), run_model(emulated(after), feeds)
    assert list(expected) == list(found)
    errors = []
    for name, truth in expected.items():
        if truth.dtype.kind != "f":
            continue
        assert np.isfinite(found[name]).all() or not np.isfinite(truth).all(), name
        assert found[name].shape == truth.shape
        peak = float(np.abs(truth).max(initial=0)) or 1.0
        errors.append(float(np.abs(found[name] - truth).max(initial=0)) / peak)
    return max(errors)


def casts(model: ir.Model) -> list[tuple[str, str]]:
    """Return what each Cast of the graph reads, and the type it makes."""
    return [
        (str(node.inputs[0].name), ir.DataType(node.attributes["to"].as_int()).name)
        for node in model.graph.all_nodes()
        if node.op_type == "Cast" and node.inputs[0] is not None
    ]


def float32_nodes(result: PassResult) -> dict[str, str]:
    return {skip.node: skip.reason for skip in result.skips}


MLP = """g (float[N, 32] x) => (float[N, 32] y) {
    [fc1] a = MatMul(x, w) [act] r = Relu(a) [fc2] y = MatMul(r, w) }"""

NORM = """g (float[N, 32] x) => (float[N, 32] y) {
    [sq] p = Pow(x, two) [mean] m = ReduceMean<keepdims=1>(p, axes) [eps] e = Add(m, tiny)
    [root] s = Sqrt(e) [div] n = Div(x, s) [scale] k = Mul(n, gamma) [fc] y = MatMul(k, w) }"""
NORM_WEIGHTS = {
    "two": np.float32(2),
    "axes": np.array([-1]),
    "tiny": np.float32(1e-12),
    "gamma": 1 + 0.1 * random_array(32),
    "w": WEIGHT,
}

LOOP = """g (int64 n, float[N, 32] x) => (float[N, 32] y, float[M, N, 32] all) {
    keep = Constant<value = bool {1}>()
    [loop] s, all = Loop (n, keep, x) <body = body
        (int64 i, bool go, float[N, 32] h) => (bool again, float[N, 32] next, float[N, 32] out)
        { again = Identity(go) [in] a = MatMul(h, w) [act] out = Tanh(a)
          [grow] next = Mul(out, factor) } >
    y = MatMul(s, w) }"""
