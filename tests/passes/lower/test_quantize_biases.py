"""Biases of integer products as int32 codes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.biases import LARGEST_CODE
from qcompiler.passes.lower.quantize_biases import QuantizeBiases
from qcompiler.quant.granularity import PerAxis
from tests.support.calibrated import compile_calibrated
from tests.support.coded import coded_weight
from tests.support.graphs import build, initializer, node_named, op_types, random_array
from tests.support.parity import assert_parity, random_feeds
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

DATA = """q = QuantizeLinear(x, xs, xz)
          d = DequantizeLinear(q, xs, xz)"""
STEP = np.float32(0.05)
BIAS = random_array(12, seed=3)


def product(node: str, bias: Any = BIAS, *, turned: bool = False, data: str = DATA) -> ir.Model:
    shape = (12, 32) if turned else (32, 12)
    weight = coded_weight(shape, PerAxis(0 if turned else 1), bits=8, signed=True)
    text = f"""g (float[5, 32] x) => (float[5, 12] y) {{
        {data} {weight.dequantize("wd")} {node} }}"""
    constants = {**weight.weights, "xs": STEP, "xz": np.uint8(128), "c": bias}
    return build(text, constants)


def conv(bias: Any) -> ir.Model:
    weight = coded_weight((12, 4, 3, 3), PerAxis(0), bits=8, signed=True)
    text = f"""g (float[2, 4, 6, 6] x) => (float[2, 12, h, v] y) {{
        {DATA} {weight.dequantize("wd")} [op] y = Conv(d, wd, c) }}"""
    return build(text, {**weight.weights, "xs": STEP, "xz": np.uint8(128), "c": bias})


CASES = {
    "gemm": lambda: product("[op] y = Gemm(d, wd, c)"),
    "gemm-transposed": lambda: product("[op] y = Gemm<transB=1>(d, wd, c)", turned=True),
    "gemm-beta": lambda: product("[op] y = Gemm<beta=2.0>(d, wd, c)"),
    "gemm-scalar": lambda: product("[op] y = Gemm(d, wd, c)", random_array(1)),
    "gemm-row": lambda: product("[op] y = Gemm(d, wd, c)", BIAS.reshape(1, 12)),
    "matmul": lambda: product("[op] m = MatMul(d, wd) y = Add(m, c)"),
    "matmul-left": lambda: product("[op] m = MatMul(d, wd) y = Add(c, m)"),
    "conv": lambda: conv(BIAS),
}


@pytest.mark.parametrize("name", CASES)
def test_rewrites_and_keeps_numerics(name: str, tmp_path: Path) -> None:
    after = CASES[name]()
    if name.startswith("matmul"):
        node_named(after, "op").outputs[0].shape = ir.Shape([5, 12])
    result = run_pass(QuantizeBiases(), after, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["op"]
    codes = initializer(after, "c.codes")
    assert codes.dtype == np.int32
    assert codes.shape == (12,)
    assert "c" not in after.graph.initializers
    assert "beta" not in node_named(after, "op").attributes
    # One step is 0.05 * 0.02 at most; results are of the order of 50.
    assert_parity(CASES[name](), after, tolerance=1e-4)


def test_codes_are_in_steps_of_both_scales(tmp_path: Path) -> None:
    model = CASES["gemm"]()
    run_pass(QuantizeBiases(), model, tmp_path)
    step = initializer(model, "w_s") * STEP
    assert (initializer(model, "c.scale") == step).all()
    assert (initializer(model, "c.codes") == np.rint(BIAS.astype(np.float64) / step)).all()


def test_refuses_what_overflows(tmp_path: Path) -> None:
    huge = np.full(12, 0.02 * STEP * LARGEST_CODE * 2, np.float32)
    model = product("[op] y = Gemm(d, wd, c)", huge)
    skip = only_skip(run_pass(QuantizeBiases(), model, tmp_path))
    assert "leave no room" in skip.reason


@pytest.mark.parametrize(
    "model",
    [
        lambda: product("[op] y = Gemm<alpha=0.5>(d, wd, c)"),
        lambda: product("[op] y = Gemm(x, wd, c)", data=""),
        lambda: product("[op] m = MatMul(d, wd) y = Mul(m, c)"),
        lambda: product("[op] y = Gemm(d, wd, c)", random_array(5, 1)),
        lambda: product("[op] y = Gemm(d, wd)"),
    ],
    ids=["alpha", "float data", "no Add", "column", "none"],
)
def test_leaves_the_rest_alone(model: Any, tmp_path: Path) -> None:
    after = model()
    assert run_pass(QuantizeBiases(), after, tmp_path).rewrites == ()
    assert op_types(after) == op_types(model())


def test_leaves_weight_only_schemes_alone(tmp_path: Path) -> None:
    model = CASES["gemm"]()
    node_named(model, "op").metadata_props["qcompiler.scheme"] = "w8a16:sym"
    assert run_pass(QuantizeBiases(), model, tmp_path).rewrites == ()


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(QuantizeBiases(), CASES["gemm"](), tmp_path)


TINY = np.where(np.arange(48) % 5 == 0, 1e-12, 1.0)


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_channels_of_tiny_weights_keep_their_bias(op: str, tmp_path: Path) -> None:
    """In steps of their own scale it overflows; ONNX Runtime then returned 11 dB."""
    first = "a=Gemm(x,m1,b)" if op == "Gemm" else "t=MatMul(x,m1) a=Add(t,b)"
    text = f"g (float[N,64] x) => (float[N,32] y) {{ {first} r=Relu(a) y=MatMul(r,m2) }}"
    weights: dict[str, Any] = {"m1": (random_array(64, 48) / 8 * TINY).astype(np.float32)}
    weights |= {"m2": random_array(48, 32) / 7, "b": random_array(48) + 2}
    model = build(text, weights)
    made = compile_calibrated(model, random_feeds(model, 0), tmp_path)
    assert made.worst_db() > 30
    assert made.kernel_loss_db() > 100


@pytest.mark.parametrize(
    "text",
    [
        "y=Gemm(x,m,b)",
        "y=Gemm<transB=1>(x,mt,b)",
        "y=Gemm<beta=0.5>(x,m,b)",
        "t=MatMul(x,m) y=Add(t,b)",
        "t=MatMul(x,m) a=Add(b,t) y=Tanh(a)",
    ],
)
def test_a_biased_product_that_returns_float_has_an_integer_kernel(
    text: str, tmp_path: Path
) -> None:
    matrix = random_array(64, 48) / 8
    kept = {"mt": np.ascontiguousarray(matrix.T)} if "mt" in text else {"m": matrix}
    model = build(
        f"g (float[N,64] x) => (float[N,48] y) {{ {text} }}", {**kept, "b": random_array(48)}
    )
    made = compile_calibrated(model, random_feeds(model, 0), tmp_path)
    assert made.ops[:2] == ["QuantizeLinear", "QGemm"]
    assert made.result.report.summary.integer_kernels == 1
    assert made.kernel_loss_db() > 100
