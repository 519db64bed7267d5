"""A new bias adds up to the same whatever op it is given to."""

import re
from pathlib import Path

import numpy as np
import pytest

from qcompiler.ir.linear_ops import LinearOp
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.quantize.bias_writing import write_bias
from qcompiler.rewriting.structure import structural_faults
from tests.support.graphs import build, node_named, random_array
from tests.support.parity import run_model

W = random_array(6, 4, seed=1)
CASES = {
    "gemm": "[op] y = Gemm(x, w, b)",
    "gemm-beta": "[op] y = Gemm<alpha=2.0, beta=0.5>(x, w, b)",
    "gemm-scalar": "[op] y = Gemm(x, w, one)",
    "gemm-none": "[op] y = Gemm(x, w)",
    "gemm-twice": "[op] t = Gemm(x, w, b) y = Add(t, b)",
    "matmul": "[op] y = MatMul(x, w)",
    "matmul-residual": "[op] t = MatMul(x, w) u = MatMul(x, w) y = Add(t, u)",
    "matmul-add": "[op] t = MatMul(x, w) y = Add(t, b)",
    "matmul-add-left": "[op] t = MatMul(x, w) y = Add(b, t)",
}


@pytest.mark.parametrize("name", CASES)
def test_the_result_moves_by_the_difference(name: str, tmp_path: Path) -> None:
    body = CASES[name]
    weights = {"w": W, "v": W, "b": random_array(4, seed=2), "one": random_array(1, seed=3)}
    body = body.replace("u = MatMul(x, w)", "u = MatMul(x, v)")
    used = {key: value for key, value in weights.items() if re.search(rf"[(, ]{key}[,)]", body)}
    model = build(f"g (float[n, 6] x) => (float[n, 4] y) {{ {body} }}", used)
    feeds = {"x": random_array(5, 6, seed=4)}
    before = run_model(model, feeds)["y"]
    op = LinearOp.of(node_named(model, "op"))
    bias, shift = op.read_bias(), np.arange(4.0)
    value = write_bias(op, bias + shift, WeightStore(tmp_path), "a-pass", {"y"})
    assert list(structural_faults(model)) == []
    assert value.name in model.graph.initializers
    assert np.allclose(run_model(model, feeds)["y"] - before, shift, atol=1e-5)
    assert np.allclose(LinearOp.of(op.node).read_bias(), bias + shift, atol=1e-6)
    assert all(tensor.uses() for tensor in model.graph.initializers.values())
