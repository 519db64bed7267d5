"""What the table of fusions says, against what ONNX Runtime does."""

from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler.execution.kernels import inspect_kernels
from qcompiler.execution.ort_fusion import is_fused_by_runtime, is_plain_product, weight_path
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock
from tests.support.coded import coded_weight, opset_for
from tests.support.graphs import build, node_named

ROWS = PerBlock(0, 32)
COLUMNS = PerBlock(1, 32)


def product(
    shape: tuple[int, int], granularity: Granularity, bits: int, body: str, inputs: str = ""
) -> ir.Model:
    weight = coded_weight(shape, granularity, bits=bits, signed=True)
    text = f"""g (float[b, 64] x{inputs}) => (float[b, n] y) {{
        {weight.dequantize("wd")} {body} }}"""
    model = build(text, weight.weights, opset=opset_for(bits))
    model.ir_version = 13
    return model


@pytest.mark.parametrize(
    ("model", "fused"),
    [
        (product((64, 32), ROWS, 4, "[p] y = MatMul(x, wd)"), True),
        (product((64, 32), PerAxis(1), 8, "[p] y = MatMul(x, wd)"), True),
        (product((64, 32), ROWS, 2, "[p] y = MatMul(x, wd)"), True),
        (product((64, 32), ROWS, 4, "[p] y = Gemm(x, wd)"), True),
        (product((64, 32), ROWS, 4, "[p] y = Gemm<alpha=0.5>(x, wd)"), False),
        (product((64, 32), ROWS, 4, "[p] h = Gemm(x, wd) r = Relu(h) y = Neg(r)"), False),
        (product((64, 32), ROWS, 4, "[p] h = Gemm(x, wd) r = Tanh(h) y = Neg(r)"), True),
        (product((64, 32), ROWS, 4, "[p] h = Gemm(x, wd) y = Relu(h)"), True),
        (product((64, 32), ROWS, 4, "[p] h = MatMul(x, wd) r = Relu(h) y = Neg(r)"), False),
        (product((64, 32), ROWS, 4, "[p] h = MatMul(x, wd) r = Clip(h) y = Neg(r)"), False),
        (product((64, 32), ROWS, 4, "[p] h = MatMul(x, wd) r = Sigmoid(h) y = Neg(r)"), True),
        (product((32, 64), COLUMNS, 4, "[p] y = Gemm<transB=1>(x, wd)"), False),
        (product((64, 64), ROWS, 4, "[p] t = MatMul(x, wd) y = MatMul(t, wd)"), False),
        (
            product((32, 64), COLUMNS, 4, "t = Transpose<perm=[1, 0]>(wd) [p] y = MatMul(x, t)"),
            False,
        ),
        (
            product((32, 64), PerAxis(0), 8, "t = Transpose<perm=[1, 0]>(wd) [p] y = MatMul(x, t)"),
            True,
        ),
        (
            product((32, 64), PerAxis(0), 4, "t = Transpose<perm=[1, 0]>(wd) [p] y = MatMul(x, t)"),
            False,
        ),
    ],
)
def test_agrees_with_the_runtime(model: ir.Model, fused: bool, tmp_path: Path) -> None:
    node = node_named(model, "p")
    path = weight_path(node)
    assert path is not None
    assert is_fused_by_runtime(node, path, model.graph) == fused
    ir.save(model, tmp_path / "m.onnx")
    found = inspect_kernels(tmp_path / "m.onnx", ["p"], memory_limit=1 << 30)
    assert found.kernels["p"].integer == fused


def test_2_bit_with_odd_outputs_counts_as_not_fused() -> None:
    model = product((64, 33), ROWS, 2, "[p] y = MatMul(x, wd)")
    node = node_named(model, "p")
    path = weight_path(node)
    assert path is not None
    assert not is_fused_by_runtime(node, path, model.graph)


@pytest.mark.parametrize(
    "body",
    [
        "[p] y = Add(x, x)",
        "[p] y = MatMul(x, x)",
        "t = Transpose<perm=[0, 1]>(wd) [p] y = MatMul(x, t)",
    ],
)
def test_no_path_to_a_coded_matrix(body: str) -> None:
    assert weight_path(node_named(product((64, 64), ROWS, 8, body), "p")) is None


@pytest.mark.parametrize(("bias", "plain"), [("b, 32", False), ("1", False), ("32", True)])
def test_only_a_bias_of_one_element_per_output_is_plain(bias: str, plain: bool) -> None:
    model = product((64, 32), ROWS, 4, "[p] y = Gemm(x, wd, c)", inputs=f", float[{bias}] c")
    assert is_plain_product(node_named(model, "p")) == plain


@pytest.mark.parametrize("scale_type", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_float16_in_a_body_counts_as_not_fused(scale_type: ir.DataType) -> None:
    weight = coded_weight((64, 32), ROWS, bits=4, signed=True, scale_type=scale_type)
    dtype = "float16" if scale_type == ir.DataType.FLOAT16 else "float"
    text = f"""g (bool c, {dtype}[2, 64] x) => ({dtype}[2, 32] y) {{
        y = If (c) <
            then_branch = yes () => ({dtype}[2, 32] t) {{
                {weight.dequantize("wd")} [p] t = MatMul(x, wd) }},
            else_branch = no () => ({dtype}[2, 32] e) {{
                {weight.dequantize("ed")} e = MatMul(x, ed) }}
        > }}"""
    inner = {f"yes/{name}": tensor for name, tensor in weight.weights.items()}
    model = build(text, {**inner, **{f"no/{n}": t for n, t in weight.weights.items()}})
    node = node_named(model, "p")
    path = weight_path(node)
    assert path is not None
    assert is_fused_by_runtime(node, path, model.graph) == (dtype == "float")
