"""Quantized Gemms that ONNX Runtime does not fuse."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.sessions import open_session
from qcompiler.passes.lower.decompose_gemm import DecomposeGemm
from qcompiler.quant.granularity import PerAxis
from tests.support.coded import CodedWeight, coded_weight
from tests.support.graphs import build, node_named, op_types, random_array
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, run_pass

BIAS = random_array(12)


def gemm(
    attributes: str, *, weight: CodedWeight, x: str = "float[5, 32]", scheme: str = "w8a16:sym"
) -> ir.Model:
    text = f"""g ({x} x) => (float[5, 12] y) {{
        {weight.dequantize("wd")}
        [fc] y = Gemm{attributes}(x, wd, c) }}"""
    model = build(text, {**weight.weights, "c": BIAS})
    node_named(model, "fc").metadata_props["qcompiler.scheme"] = scheme
    return model


def test_a_bias_that_is_broadcast_is_split_off(tmp_path: Path) -> None:
    weight = columns()

    def broadcast() -> ir.Model:
        text = f"""g (float[5, 32] x) => (float[5, 12] y) {{
            {weight.dequantize("wd")} [fc] y = Gemm(x, wd, c) }}"""
        return build(text, {**weight.weights, "c": random_array(1)})

    after = broadcast()
    run_pass(DecomposeGemm(), after, tmp_path)
    assert op_types(after) == ["DequantizeLinear", "MatMul", "Add"]
    assert_parity(broadcast(), after, tolerance=1e-5)
    with open_session(after, optimize=True, threads=1) as session:
        assert session.run({"x": random_array(5, 32)})["y"].shape == (5, 12)


def columns() -> CodedWeight:
    return coded_weight((32, 12), PerAxis(1), bits=8, signed=True)


def rows() -> CodedWeight:
    return coded_weight((12, 32), PerAxis(0), bits=8, signed=True)


@pytest.mark.parametrize(
    ("attributes", "weight", "x", "ops"),
    [
        ("<transB=1>", rows(), "float[5, 32]", ["Transpose", "MatMul", "Add"]),
        ("<alpha=0.5>", columns(), "float[5, 32]", ["MatMul", "Mul", "Add"]),
        ("<beta=2.0>", columns(), "float[5, 32]", ["MatMul", "Mul", "Add"]),
        ("<transA=1>", columns(), "float[32, 5]", ["Transpose", "MatMul", "Add"]),
        (
            "<alpha=0.5, beta=2.0, transA=1, transB=1>",
            rows(),
            "float[32, 5]",
            ["Transpose", "Transpose", "MatMul", "Mul", "Mul", "Add"],
        ),
    ],
)
def test_rewrites_what_the_runtime_does_not_fuse(
    attributes: str, weight: CodedWeight, x: str, ops: list[str], tmp_path: Path
) -> None:
    after = gemm(attributes, weight=weight, x=x)
    run_pass(DecomposeGemm(), after, tmp_path)
    assert op_types(after) == ["DequantizeLinear", *ops]
    assert_parity(gemm(attributes, weight=weight, x=x), after, tolerance=1e-5)


def test_product_keeps_the_facts_of_the_site(tmp_path: Path) -> None:
    after = gemm("<transB=1>", weight=rows())
    run_pass(DecomposeGemm(), after, tmp_path)
    product = node_named(after, "fc")
    assert product.op_type == "MatMul"
    assert product.metadata_props["qcompiler.scheme"] == "w8a16:sym"
    assert product.metadata_props["qcompiler.origin_op"] == "Gemm"
    others = [node for node in after.graph if node is not product]
    assert all("qcompiler.scheme" not in node.metadata_props for node in others)


def test_rewrites_a_plain_gemm_for_dynamic_activations(tmp_path: Path) -> None:
    after = gemm("", weight=columns(), scheme="w8a8-dynamic:sym")
    run_pass(DecomposeGemm(), after, tmp_path)
    assert op_types(after) == ["DequantizeLinear", "MatMul", "Add"]


def test_leaves_fused_and_float_gemms_alone(tmp_path: Path) -> None:
    model = gemm("", weight=columns())
    assert run_pass(DecomposeGemm(), model, tmp_path).rewrites == ()
    text = "g (float[5, 32] x, float[12, 32] w) => (float[5, 12] y) { y = Gemm<transB=1>(x, w) }"
    assert run_pass(DecomposeGemm(), build(text), tmp_path).rewrites == ()


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(DecomposeGemm(), gemm("<alpha=0.5>", weight=columns()), tmp_path)


def on_codes(attributes: str, scheme: str, bias: str = "") -> ir.Model:
    """Return a Gemm whose data is dequantized right before it."""
    weight = coded_weight((32, 12), PerAxis(1), bits=8, signed=True)
    text = f"""g (float[5, 32] x) => (float[5, 12] y) {{
        q = QuantizeLinear(x, xs, xz) d = DequantizeLinear(q, xs, xz)
        {weight.dequantize("wd")}
        [fc] y = Gemm{attributes}(d, wd{bias}) }}"""
    constants = {"xs": np.float32(0.05), "xz": np.uint8(128), "c": BIAS}
    model = build(text, {**weight.weights, **constants})
    node_named(model, "fc").metadata_props["qcompiler.scheme"] = scheme
    return model


@pytest.mark.parametrize(
    ("attributes", "bias", "scheme", "decomposed"),
    [
        ("", "", "w8a8:sym", False),
        ("<alpha=0.5>", "", "w8a8:sym", True),
        ("<beta=0.5>", ", c", "w8a8:sym", True),
        ("", ", c", "w8a8:sym", True),
        ("", "", "w8a8-dynamic:sym", True),
        ("", "", "w8a16:sym", False),
        ("<alpha=0.5>", "", "w8a16:sym", True),
    ],
)
def test_a_gemm_on_quantized_data(
    attributes: str, bias: str, scheme: str, decomposed: bool, tmp_path: Path
) -> None:
    """A bias that quantize-biases left in float keeps QGemm away, as alpha and beta do."""
    after = on_codes(attributes, scheme, bias)
    run_pass(DecomposeGemm(), after, tmp_path)
    assert ("Gemm" not in op_types(after)) == decomposed
    assert_parity(on_codes(attributes, scheme, bias), after, tolerance=1e-5)
