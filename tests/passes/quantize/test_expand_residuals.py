"""What the codes of an activation leave out is multiplied as well."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.passes.quantize.expand_residuals import ExpandResiduals
from qcompiler.passes.quantize.insert_activation_qdq import InsertActivationQdq
from tests.support.calibrated import compile_calibrated, distance_db
from tests.support.graphs import build, initializer, node_named, op_types, random_array
from tests.support.parity import assert_parity, run_model
from tests.support.rewrites import assert_idempotent, run_pass

CASES = {
    "matmul": "y = MatMul(x, w)",
    "matmul-add": "[op] t = MatMul(x, w) y = Add(t, b)",
    "gemm": "y = Gemm(x, w, b)",
    "gemm-all": "y = Gemm<alpha=-3.0, beta=0.5, transB=1>(x, wt, b)",
    "computed": "c = Neg(x) [op] y = MatMul(c, w)",
}


def model(name: str = "matmul", quantizer: str = "uint8:asym") -> ir.Model:
    body = CASES[name] if "[op]" in CASES[name] else f"[op] {CASES[name]}"
    matrix = random_array(64, 8)
    weights = {"w": matrix, "wt": np.ascontiguousarray(matrix.T), "b": random_array(8)}
    kept = {key: value for key, value in weights.items() if f" {key}" in body}
    made = build(f"g (float[5, 64] x) => (float[5, 8] y) {{ {body} }}", kept)
    node = node_named(made, "op")
    node.metadata_props["qcompiler.quantized_inputs"] = "[0]"
    node.metadata_props["qcompiler.scheme"] = "w8a8"
    for value in (output for each in made.graph for output in each.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = value.shape or ir.Shape([5, 64 if value.name == "c" else 8])
    (data,) = (value for value in node.inputs[:1] if value is not None)
    data.metadata_props["qcompiler.quantizer"] = quantizer
    data.metadata_props["qcompiler.range"] = "[-30.0, 50.0]"
    data.metadata_props["qcompiler.terms"] = "2"
    return made


@pytest.mark.parametrize("name", CASES)
def test_nothing_changes_until_quantizers_are_there(name: str, tmp_path: Path) -> None:
    after = model(name)
    result = run_pass(ExpandResiduals(), after, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["op"]
    assert op_types(after).count("Sub") == 1
    assert [value.name for value in after.graph.outputs] == ["y"]
    assert_parity(model(name), after, tolerance=0)


@pytest.mark.parametrize("quantizer", ["uint8:asym", "int8:asym", "int8:sym"])
@pytest.mark.parametrize("name", CASES)
def test_two_terms_see_fifteen_bits(name: str, quantizer: str, tmp_path: Path) -> None:
    feeds = {"x": random_array(5, 64, seed=3)}
    truth = run_model(model(name), feeds)["y"]
    found = {}
    for terms in (1, 2):
        after = model(name, quantizer)
        if terms == 2:
            run_pass(ExpandResiduals(), after, tmp_path)
        run_pass(InsertActivationQdq(), after, tmp_path)
        found[terms] = distance_db(truth, run_model(after, feeds)["y"])
    # 254 steps in one: 48 dB, less what a sum of few random errors varies by.
    assert found[2] > found[1] + 42


def test_the_weight_is_shared(tmp_path: Path) -> None:
    after = model()
    run_pass(ExpandResiduals(), after, tmp_path)
    assert list(after.graph.initializers) == ["w"]
    assert len(after.graph.initializers["w"].uses()) == 2
    assert (initializer(after, "w") == random_array(64, 8)).all()


def test_products_of_one_value_share_its_residual(tmp_path: Path) -> None:
    body = "[a] y = MatMul(x, w) [b] z = MatMul(x, v)"
    text = f"g (float[5, 64] x) => (float[5, 8] y, float[5, 8] z) {{ {body} }}"
    made = build(text, {"w": random_array(64, 8), "v": random_array(64, 8, seed=1)})
    for name in "ab":
        node_named(made, name).metadata_props["qcompiler.quantized_inputs"] = "[0]"
    made.graph.inputs[0].metadata_props.update(model().graph.inputs[0].metadata_props)
    result = run_pass(ExpandResiduals(), made, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["a", "b"]
    assert op_types(made).count("Sub") == 1


def test_the_second_product_says_why(tmp_path: Path) -> None:
    after = model()
    run_pass(ExpandResiduals(), after, tmp_path)
    facts = node_named(after, "y.of_residual").metadata_props
    assert facts["qcompiler.scheme"] == "w8a8"
    assert facts["qcompiler.reason"] == "what the codes of the data of op leave out"


def test_leaves_what_has_one_term(tmp_path: Path) -> None:
    made = model()
    del made.graph.inputs[0].metadata_props["qcompiler.terms"]
    assert run_pass(ExpandResiduals(), made, tmp_path).rewrites == ()


@pytest.mark.parametrize("left_in_float", ["value", "op"])
def test_leaves_what_was_left_in_float_since_it_was_calibrated(
    left_in_float: str, tmp_path: Path
) -> None:
    made = model()
    if left_in_float == "value":
        del made.graph.inputs[0].metadata_props["qcompiler.quantizer"]
    else:
        del node_named(made, "op").metadata_props["qcompiler.quantized_inputs"]
    assert run_pass(ExpandResiduals(), made, tmp_path).rewrites == ()


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(ExpandResiduals(), model(), tmp_path)


def heavy_tailed() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Return the like of what a gate makes: most values small, large ones in any channel."""
    parts = [random_array(16, 64, seed=i) for i in range(3)]
    return {"x": (parts[0] * parts[1] * parts[2] ** 3).astype(np.float32)}


def test_a_compilation_gives_heavy_tails_two_terms(tmp_path: Path) -> None:
    text = "g (float[N, 64] x) => (float[N, 32] y) { [op] y = MatMul(x, w) }"
    weights = {"w": random_array(64, 32)}
    quality, ops = {}, {}
    for steps in (0.0, 3.0):
        compiled = compile_calibrated(
            build(text, weights), heavy_tailed(), tmp_path, two_terms_below=steps
        )
        quality[steps], ops[steps] = compiled.worst_db(), compiled.ops
        passes = {each.name: each.rewrites for each in compiled.result.report.passes}
        assert passes["expand-residuals"] == (steps > 0)
    # What is left is the noise of the weight.
    assert quality[3.0] > quality[0.0] + 6
    assert ops[3.0].count("MatMulIntegerToFloat") == 2
