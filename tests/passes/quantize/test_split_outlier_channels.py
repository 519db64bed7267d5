"""Outlier channels are multiplied in float, and the sum stays what it was."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.passes.quantize.split_outlier_channels import SplitOutlierChannels
from tests.support.graphs import build, initializer, node_named, op_types, random_array
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

CASES = {
    "matmul": "y = MatMul(x, w)",
    "matmul-add": "[op] t = MatMul(x, w) y = Add(t, b)",
    "gemm": "y = Gemm(x, w, b)",
    "gemm-alpha-beta": "y = Gemm<alpha=0.5, beta=3.0>(x, w, b)",
    "gemm-transB": "y = Gemm<transB=1>(x, wt, b)",
    "gemm-all": "y = Gemm<alpha=-2.0, beta=0.5, transB=1>(x, wt, b)",
    "transpose": "t = Transpose<perm=[1, 0]>(wt) [op] y = MatMul(x, t)",
}


def model(name: str = "matmul", channels: str = "[3, 17]") -> ir.Model:
    body = CASES[name] if "[op]" in CASES[name] else f"[op] {CASES[name]}"
    matrix = random_array(64, 8)
    weights = {"w": matrix, "wt": np.ascontiguousarray(matrix.T), "b": random_array(8)}
    unused = {"w" if "wt" in body else "wt"} | (set() if "b)" in body else {"b"})
    kept = {key: value for key, value in weights.items() if key not in unused}
    made = build(f"g (float[5, 64] x) => (float[5, 8] y) {{ {body} }}", kept)
    made.graph.inputs[0].metadata_props["qcompiler.outlier_channels"] = channels
    node = node_named(made, "op")
    node.metadata_props["qcompiler.quantized_inputs"] = "[0]"
    for value in (output for each in made.graph for output in each.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = value.shape or ir.Shape([5, 8])
    return made


@pytest.mark.parametrize("name", CASES)
def test_rewrites_and_keeps_numerics(name: str, tmp_path: Path) -> None:
    after = model(name)
    result = run_pass(SplitOutlierChannels(), after, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["op"]
    assert op_types(after).count("Gather") == 1
    assert [value.name for value in after.graph.outputs] == ["y"]
    assert_parity(model(name), after, tolerance=1e-5)


def test_the_rows_are_zero_in_one_weight_and_alone_in_the_other(tmp_path: Path) -> None:
    after = model()
    run_pass(SplitOutlierChannels(), after, tmp_path)
    before = random_array(64, 8)
    assert (initializer(after, "w.outliers") == before[[3, 17]]).all()
    inliers = initializer(after, "w.inliers")
    assert (inliers[[3, 17]] == 0).all()
    assert (np.delete(inliers, [3, 17], axis=0) == np.delete(before, [3, 17], axis=0)).all()
    assert "w" not in after.graph.initializers


def test_the_product_that_stays_in_float_says_why(tmp_path: Path) -> None:
    after = model()
    run_pass(SplitOutlierChannels(), after, tmp_path)
    facts = node_named(after, "y.of_outliers").metadata_props
    assert facts["qcompiler.scheme"] == "float"
    assert "outlier channels of the data of op" in facts["qcompiler.reason"]


def test_products_of_one_value_share_its_columns(tmp_path: Path) -> None:
    text = """g (float[5, 64] x) => (float[5, 8] y, float[5, 8] z) {
        [op] y = MatMul(x, w) [op2] z = MatMul(x, v) }"""
    made = build(text, {"w": random_array(64, 8), "v": random_array(64, 8, seed=1)})
    made.graph.inputs[0].metadata_props["qcompiler.outlier_channels"] = "[63]"
    for node in made.graph:
        node.metadata_props["qcompiler.quantized_inputs"] = "[0]"
    run_pass(SplitOutlierChannels(), made, tmp_path)
    assert op_types(made).count("Gather") == 1
    assert op_types(made).count("MatMul") == 4


def test_names_that_are_taken_get_a_number(tmp_path: Path) -> None:
    made = model()
    made.graph.inputs[0].name = "w.inliers"
    run_pass(SplitOutlierChannels(), made, tmp_path)
    assert "w.inliers_2" in made.graph.initializers


def test_refuses_shared_weights(tmp_path: Path) -> None:
    text = """g (float[5, 64] x) => (float[5, 8] y, float[5, 8] z) {
        [op] y = MatMul(x, w) h = Relu(x) z = MatMul(h, w) }"""
    made = build(text, {"w": random_array(64, 8)})
    made.graph.inputs[0].metadata_props["qcompiler.outlier_channels"] = "[1]"
    node_named(made, "op").metadata_props["qcompiler.quantized_inputs"] = "[0]"
    skip = only_skip(run_pass(SplitOutlierChannels(), made, tmp_path))
    assert skip.reason == "its weight w is shared"


def test_leaves_products_of_float_data_alone(tmp_path: Path) -> None:
    made = model()
    del node_named(made, "op").metadata_props["qcompiler.quantized_inputs"]
    assert run_pass(SplitOutlierChannels(), made, tmp_path).rewrites == ()
    made = model()
    made.graph.inputs[0].metadata_props.clear()
    assert run_pass(SplitOutlierChannels(), made, tmp_path).rewrites == ()


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(SplitOutlierChannels(), model(), tmp_path)
