"""float16 products that ONNX Runtime computes in float32, with its optimizations and without.

Its Casts of a scale that two ops read, or that lies in a body, are not folded, and MatMulNBits
with accuracy_level 4 returns zeros for scales that are not constant.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.sessions import open_session
from qcompiler.ir.dataflow import all_nodes
from qcompiler.passes.lower.lower_embeddings import LowerEmbeddings
from qcompiler.passes.lower.lower_matmul_nbits import LowerMatMulNBits
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock
from tests.support.coded import CodedWeight, coded_weight, opset_for
from tests.support.graphs import build
from tests.support.rewrites import run_pass

ROUNDED = 5e-2
"""Root mean square: the float32 kernel rounds activations to 8 bits, the float16 one does not."""
ROWS = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float16)


def half_weight(granularity: Granularity, bits: int) -> CodedWeight:
    return coded_weight(
        (64, 64), granularity, bits=bits, signed=True, scale_type=ir.DataType.FLOAT16
    )


def lowered(text: str, weights: dict[str, Any], bits: int, folder: Path) -> ir.Model:
    model = build(text, weights, opset=opset_for(bits))
    model.ir_version = 13
    run_pass(LowerMatMulNBits(), model, folder)
    run_pass(LowerEmbeddings(), model, folder)
    return model


def assert_optimizing_changes_nothing(model: ir.Model, feeds: dict[str, Any]) -> None:
    found = {}
    for optimize in (False, True):
        with open_session(model, optimize=optimize, threads=1) as session:
            found[optimize] = session.run(feeds)["y"].astype(np.float64)
    norm = np.linalg.norm(found[False])
    assert norm > 0
    assert np.linalg.norm(found[True] - found[False]) <= ROUNDED * norm


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("granularity", [PerAxis(1), PerBlock(0, 32)])
def test_a_weight_of_two_products(bits: int, granularity: Granularity, tmp_path: Path) -> None:
    weight = half_weight(granularity, bits)
    text = f"""g (float16[b, 64] x) => (float16[b, 64] y) {{
        {weight.dequantize("wd")}
        s = Sigmoid(x) [one] t = MatMul(s, wd)
        u = Sigmoid(t) [two] v = MatMul(u, wd) y = Tanh(v) }}"""
    model = lowered(text, weight.weights, bits, tmp_path)
    products = [node for node in all_nodes(model) if node.op_type == "MatMulNBits"]
    assert len({product.inputs[2] for product in products}) == 2
    assert_optimizing_changes_nothing(model, {"x": ROWS})


@pytest.mark.parametrize("granularity", [PerAxis(0), PerBlock(1, 32)])
def test_products_behind_a_transpose_and_a_lookup(granularity: Granularity, tmp_path: Path) -> None:
    weight = coded_weight(
        (64, 96), granularity, bits=8, signed=True, scale_type=ir.DataType.FLOAT16
    )
    text = f"""g (int64[b] ids) => (float16[b, 64] y) {{
        {weight.dequantize("wd")}
        wt = Transpose<perm=[1, 0]>(wd)
        e = Gather(wd, ids) s = Sigmoid(e) [one] t = MatMul(s, wt)
        n = Tanh(e) [two] u = MatMul(n, wt) a = Tanh(t) c = Sigmoid(u) y = Add(a, c) }}"""
    model = lowered(text, weight.weights, 8, tmp_path)
    assert "GatherBlockQuantized" in [node.op_type for node in all_nodes(model)]
    assert_optimizing_changes_nothing(model, {"ids": np.array([1, 2, 3])})


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("granularity", [PerAxis(1), PerBlock(0, 32)])
@pytest.mark.parametrize("place", ["yes/", ""])
def test_a_product_in_a_body(
    bits: int, granularity: Granularity, place: str, tmp_path: Path
) -> None:
    weight = half_weight(granularity, bits)
    text = f"""g (bool c, float16[b, 64] x) => (float16[b, 64] y) {{
        y = If (c) <
            then_branch = yes () => (float16[b, 64] v) {{
                {weight.dequantize("wd")}
                s = Sigmoid(x) [one] t = MatMul(s, wd) v = Tanh(t) }},
            else_branch = no () => (float16[b, 64] e) {{ e = Identity(x) }}
        > }}"""
    weights = {f"{place}{name}": tensor for name, tensor in weight.weights.items()}
    model = lowered(text, weights, bits, tmp_path)
    products = [node for node in all_nodes(model) if node.op_type == "MatMulNBits"]
    assert [product.attributes["accuracy_level"].as_int() for product in products] == [1]
    assert_optimizing_changes_nothing(model, {"c": np.array(True), "x": ROWS})
