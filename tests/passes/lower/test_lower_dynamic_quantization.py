"""Dynamic quantization, against integer arithmetic in NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.kernels import inspect_kernels
from qcompiler.execution.sessions import open_session
from qcompiler.ir.dataflow import all_nodes
from qcompiler.passes.lower.lower_dynamic_quantization import LowerDynamicQuantization
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock
from tests.support.coded import CodedWeight, coded_weight
from tests.support.graphs import build, node_named, op_types
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

Array = np.ndarray[Any, np.dtype[Any]]
CODES = (-64, 64)
"""Two of them add up to 128 at most, with which no kernel saturates."""


def weight_of(
    shape: tuple[int, int] = (64, 24), granularity: Granularity | None = None, bits: int = 8
) -> CodedWeight:
    code_range = CODES if bits == 8 else None
    return coded_weight(
        shape, granularity or PerAxis(1), bits=bits, signed=True, code_range=code_range
    )


def product(weight: CodedWeight, *, op: str = "MatMul", turned: bool = False) -> ir.Model:
    turn = "wt = Transpose<perm=[1, 0]>(wd)" if turned else ""
    right = "wt" if turned else "wd"
    text = f"""g (float[b, 64] x) => (float[b, 24] y) {{
        {weight.dequantize("wd")}
        {turn}
        [fc] y = {op}(x, {right}) }}"""
    model = build(text, weight.weights)
    node_named(model, "fc").metadata_props["qcompiler.scheme"] = "w8a8-dynamic:sym"
    return model


def integer_arithmetic(x: Array, weight: CodedWeight) -> Array:
    """Compute the product as ONNX's DynamicQuantizeLinear and MatMulInteger define it."""
    low, high = np.float32(min(0.0, x.min())), np.float32(max(0.0, x.max()))
    scale = (high - low) / np.float32(255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    levels = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64)
    codes = weight.weights["w"].numpy().astype(np.int64)
    sums = (levels - int(zero)) @ codes
    result: Array = sums.astype(np.float64) * scale * weight.weights["w_s"].numpy()
    return result


def adversarial(code: int) -> CodedWeight:
    weight = weight_of()
    weight.weights["w"] = ir.tensor(np.full((64, 24), code, np.int8), name="w")
    return weight


@pytest.mark.parametrize("weight", [weight_of(), adversarial(64), adversarial(-64)])
@pytest.mark.parametrize("optimize", [True, False])
def test_equals_integer_arithmetic(weight: CodedWeight, optimize: bool, tmp_path: Path) -> None:
    model = product(weight)
    run_pass(LowerDynamicQuantization(), model, tmp_path)
    ones = np.ones((4, 64), np.float32)
    noise = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    with open_session(model, optimize=optimize, threads=1) as session:
        for x in (ones, noise):
            found, expected = session.run({"x": x})["y"], integer_arithmetic(x, weight)
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * abs(expected).max())


@pytest.mark.parametrize("turned", [False, True])
def test_runtime_fuses_it(turned: bool, tmp_path: Path) -> None:
    weight = weight_of((24, 64), PerAxis(0)) if turned else weight_of()
    model = product(weight, turned=turned)
    run_pass(LowerDynamicQuantization(), model, tmp_path)
    ir.save(model, tmp_path / "m.onnx")
    found = inspect_kernels(tmp_path / "m.onnx", ["fc"], memory_limit=1 << 30)
    assert found.kernels["fc"].name == "DynamicQuantizeMatMul"
    assert found.kernels["fc"].integer


def test_products_of_one_value_share_its_quantization(tmp_path: Path) -> None:
    one, two = weight_of(), coded_weight((64, 24), PerAxis(1), bits=8, signed=True, name="v")
    text = f"""g (float[b, 64] x) => (float[b, 24] y, float[b, 24] z) {{
        {one.dequantize("wd")} {two.dequantize("vd")}
        [a] y = MatMul(x, wd) [c] z = MatMul(x, vd) }}"""
    model = build(text, {**one.weights, **two.weights})
    for name in ("a", "c"):
        node_named(model, name).metadata_props["qcompiler.scheme"] = "w8a8-dynamic:sym"
    run_pass(LowerDynamicQuantization(), model, tmp_path)
    assert op_types(model).count("DynamicQuantizeLinear") == 1
    ir.save(model, tmp_path / "m.onnx")
    found = inspect_kernels(tmp_path / "m.onnx", ["a", "c"], memory_limit=1 << 30)
    assert {kernel.name for kernel in found.kernels.values()} == {"MatMulIntegerToFloat"}


def test_bodies_that_read_one_value_quantize_it_under_names_of_their_own(tmp_path: Path) -> None:
    one, two = weight_of(), coded_weight((64, 24), PerAxis(1), bits=8, signed=True, name="v")
    text = f"""g (bool c, float[2, 64] x) => (float[2, 24] y) {{
        y = If (c) <
            then_branch = yes () => (float[2, 24] t) {{
                {one.dequantize("wd")} [a] t = MatMul(x, wd) }},
            else_branch = no () => (float[2, 24] e) {{
                {two.dequantize("vd")} [c] e = MatMul(x, vd) }}
        > }}"""
    model = build(text, {**one.weights, **two.weights})
    for name in ("a", "c"):
        node_named(model, name).metadata_props["qcompiler.scheme"] = "w8a8-dynamic:sym"
    run_pass(LowerDynamicQuantization(), model, tmp_path)
    made = [node for node in all_nodes(model) if node.op_type == "DynamicQuantizeLinear"]
    assert [node.name for node in made] == ["x.quantized", "x.quantized_2"]
    with open_session(model, optimize=True, threads=1) as session:
        x = np.ones((2, 64), np.float32)
        found = session.run({"c": np.array(True), "x": x})["y"]
        np.testing.assert_allclose(found, integer_arithmetic(x, one), rtol=1e-5)


def test_last_node_keeps_the_facts(tmp_path: Path) -> None:
    model = product(weight_of())
    run_pass(LowerDynamicQuantization(), model, tmp_path)
    facts = node_named(model, "fc").metadata_props
    assert facts["qcompiler.scheme"] == "w8a8-dynamic:sym"
    assert facts["qcompiler.origin_op"] == "MatMul"
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize(
    ("weight", "op", "reason"),
    [
        (weight_of(granularity=PerBlock(0, 32)), "MatMul", "one scale per output channel"),
        (weight_of(granularity=PerAxis(0)), "MatMul", "one scale per output channel"),
        (weight_of(bits=4), "MatMul", "4 bits"),
        (weight_of(), "Gemm", "decompose-gemm"),
    ],
)
def test_refuses_other_weights(weight: CodedWeight, op: str, reason: str, tmp_path: Path) -> None:
    model = product(weight, op=op)
    assert reason in only_skip(run_pass(LowerDynamicQuantization(), model, tmp_path)).reason


def test_refuses_float_weights_and_other_float_types(tmp_path: Path) -> None:
    text = "g (float[b, 64] x, float[64, 24] w) => (float[b, 24] y) { [fc] y = MatMul(x, w) }"
    model = build(text)
    node_named(model, "fc").metadata_props["qcompiler.scheme"] = "w8a8-dynamic:sym"
    skip = only_skip(run_pass(LowerDynamicQuantization(), model, tmp_path))
    assert "constant codes" in skip.reason
    half = product(weight_of())
    value = node_named(half, "fc").inputs[1]
    assert value is not None
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    skip = only_skip(run_pass(LowerDynamicQuantization(), half, tmp_path))
    assert "float32, not FLOAT16" in skip.reason


def test_leaves_other_schemes_alone(tmp_path: Path) -> None:
    model = product(weight_of())
    node_named(model, "fc").metadata_props["qcompiler.scheme"] = "w8a16:sym"
    assert run_pass(LowerDynamicQuantization(), model, tmp_path).rewrites == ()


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(LowerDynamicQuantization(), product(weight_of()), tmp_path)
