"""Ops on codes, as other tools write them, become standard ops between quantizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.passes.lower.decompose_quantized_ops import DecomposeQuantizedOps
from qcompiler.passes.lower.quantized_op_forms import FORMS
from qcompiler.quant.packing import pack
from tests.support.graphs import build, op_types, random_array
from tests.support.parity import random_feeds, run_model
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> '
GENERATOR = np.random.default_rng(0)


def codes(*shape: int, low: int = -64, high: int = 64, dtype: Any = np.int8) -> Any:
    """Small enough for sums of pairs to fit 16 bits, which kernels without VNNI saturate at."""
    return GENERATOR.integers(low, high + 1, shape).astype(dtype)


def grid(name: str, scale: float, zero: int) -> dict[str, Any]:
    return {f"{name}s": np.float32(scale), f"{name}z": np.uint8(zero)}


BASE = {**grid("x", 0.05, 128), **grid("y", 0.1, 120), **grid("v", 0.02, 30)}
IN = "q = QuantizeLinear(x, xs, xz)"
BOTH = f"{IN} u = QuantizeLinear(x, vs, vz)"
OUT = "y = DequantizeLinear(r, ys, yz)"
IMAGE = "float[1,4,6,6] x"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "QLinearConv": (
        IMAGE,
        "r = QLinearConv<pads=[1,1,1,1]>(q, xs, xz, w, ws, wz, ys, yz, b)",
        {"w": codes(8, 4, 3, 3), "ws": np.linspace(0.01, 0.02, 8, dtype=np.float32),
         "wz": np.zeros(8, np.int8), "b": codes(8, dtype=np.int32)},
    ),
    "QLinearMatMul": (
        "float[5,16] x",
        "r = QLinearMatMul(q, xs, xz, w, ws, wz, ys, yz)",
        {"w": codes(16, 6), "ws": np.linspace(0.01, 0.02, 6, dtype=np.float32),
         "wz": np.zeros(6, np.int8)},
    ),
    "QGemm": (
        "float[5,16] x",
        "r = com.microsoft.QGemm<transB=1, alpha=0.5>(q, xs, xz, w, ws, wz, b, ys, yz)",
        {"w": codes(6, 16), "ws": np.float32(0.02), "wz": np.int8(0),
         "b": codes(6, dtype=np.int32)},
    ),
    "QLinearAdd": (IMAGE, "r = com.microsoft.QLinearAdd(q, xs, xz, u, vs, vz, ys, yz)", {}),
    "QLinearMul": (IMAGE, "r = com.microsoft.QLinearMul(q, xs, xz, u, vs, vz, ys, yz)", {}),
    "QLinearConcat": (
        IMAGE, "r = com.microsoft.QLinearConcat<axis=1>(ys, yz, q, xs, xz, u, vs, vz)", {},
    ),
    "QLinearAveragePool": (
        IMAGE, "r = com.microsoft.QLinearAveragePool<kernel_shape=[2,2]>(q, xs, xz, ys, yz)", {},
    ),
    "QLinearGlobalAveragePool": (
        IMAGE, "r = com.microsoft.QLinearGlobalAveragePool<channels_last=0>(q, xs, xz, ys, yz)",
        {},
    ),
    "QLinearLeakyRelu": (
        IMAGE, "r = com.microsoft.QLinearLeakyRelu<alpha=0.1>(q, xs, xz, ys, yz)", {},
    ),
    "QLinearSigmoid": (IMAGE, "r = com.microsoft.QLinearSigmoid(q, xs, xz, ys, yz)", {}),
    "QLinearSoftmax": (
        IMAGE, "r = com.microsoft.QLinearSoftmax<axis=1, opset=13>(q, xs, xz, ys, yz)", {},
    ),
}  # fmt: skip


def model_of(signature: str, nodes: str, extra: dict[str, Any]) -> ir.Model:
    weights = {
        name: value
        for name, value in {**BASE, **extra}.items()
        if any(name in part.replace(")", ",").split("(")[-1].replace(" ", "").split(",")
               for part in nodes.split(" = ")[1:])
    }  # fmt: skip
    return build(f"{HEADER} g ({signature}) => (float[] y) {{ {nodes} }}", weights)


def quantized(name: str) -> ir.Model:
    signature, op, extra = CASES[name]
    first = BOTH if " u," in op else IN
    return model_of(signature, f"{first} [site] {op} {OUT}", extra)


@pytest.mark.parametrize("name", CASES)
def test_means_the_same(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    feeds = random_feeds(model, 0)
    before = run_model(model, feeds)["y"]
    result = run_pass(DecomposeQuantizedOps(), model, tmp_path)
    assert [rewrite.detail for rewrite in result.rewrites] == [name]
    assert name not in op_types(model)
    assert {node.domain for node in model.graph.all_nodes()} == {""}
    after = run_model(model, feeds)["y"]
    # Sums in floats may round to the neighbouring code.
    assert np.abs(after - before).max() <= 0.1001
    assert np.mean(after != before) < 0.05
    assert_idempotent(DecomposeQuantizedOps(), model, tmp_path)


def test_every_form_is_shown() -> None:
    assert {form.name for form in FORMS} == set(CASES)


@pytest.mark.parametrize(
    ("carrier", "shape"),
    [
        ("MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)", "y"),
        ("Transpose<perm=[0,2,3,1]>(r)", "y"),
        ("Flatten(r)", "y"),
    ],
)
def test_what_moves_codes_moves_values(carrier: str, shape: str, tmp_path: Path) -> None:
    signature, op, extra = CASES["QLinearConv"]
    nodes = f"{IN} {op} m = {carrier} y = DequantizeLinear(m, ys, yz)"
    model = model_of(signature, nodes, extra)
    feeds = random_feeds(model, 0)
    before = run_model(model, feeds)["y"]
    run_pass(DecomposeQuantizedOps(), model, tmp_path)
    kind = carrier.split("<")[0].split("(")[0]
    (moved,) = [node for node in model.graph if node.op_type == kind]
    assert moved.inputs[0] is not None
    assert moved.inputs[0].dtype == ir.DataType.FLOAT
    after = run_model(model, feeds)["y"]
    assert np.mean(after != before) < 0.05
    assert_idempotent(DecomposeQuantizedOps(), model, tmp_path)


def packed(
    bits: int, *, zeros: bool, negative: bool = False, columns: int = 64, bias: bool = False
) -> ir.Model:
    """A MatMulNBits of `[columns, 8]` in blocks of 16."""
    blocks = -(-columns // 16)
    levels = codes(8, blocks * 16, low=0, high=(1 << bits) - 1, dtype=np.uint8)
    scale = np.linspace(0.01, 0.03, 8 * blocks, dtype=np.float32)
    if negative:
        scale[::3] *= -1
        scale[1] = 0
    weights: dict[str, Any] = {
        "w": pack(levels, bits).reshape(8, blocks, 16 * bits // 8),
        "s": scale,
    }
    inputs: Sequence[str] = ["x", "w", "s"]
    if zeros:
        width = -(-blocks * bits // 8) * 8 // bits
        points = np.zeros((8, width), np.uint8)
        points[:, :blocks] = codes(8, blocks, low=0, high=(1 << bits) - 1, dtype=np.uint8)
        weights["z"] = pack(points, bits).reshape(8, -1)
        inputs = [*inputs, "z"]
    if bias:
        inputs = [*inputs, *[""] * (5 - len(inputs)), "b"]
        weights["b"] = random_array(8)
    text = f"""{HEADER} g (float[3,{columns}] x) => (float[3,8] y) {{
        [site] y = com.microsoft.MatMulNBits<K={columns}, N=8, bits={bits}, block_size=16>
        ({", ".join(inputs)}) }}"""
    return build(text, weights)


@pytest.mark.parametrize("options", [
    {"bits": 4, "zeros": True}, {"bits": 4, "zeros": False}, {"bits": 8, "zeros": True},
    {"bits": 4, "zeros": True, "negative": True}, {"bits": 4, "zeros": False, "negative": True},
    {"bits": 4, "zeros": True, "columns": 56}, {"bits": 4, "zeros": True, "bias": True},
    {"bits": 8, "zeros": False, "bias": True},
], ids=str)  # fmt: skip
def test_matmul_nbits_keeps_its_values(options: dict[str, Any], tmp_path: Path) -> None:
    model = packed(**options)
    feeds = random_feeds(model, 0)
    before = run_model(model, feeds)["y"]
    run_pass(DecomposeQuantizedOps(), model, tmp_path)
    assert op_types(model) == ["DequantizeLinear", "Transpose", "MatMul"] + ["Add"] * (
        "bias" in options
    )
    np.testing.assert_allclose(run_model(model, feeds)["y"], before, rtol=1e-4, atol=1e-4)
    assert_idempotent(DecomposeQuantizedOps(), model, tmp_path)


def test_quantizers_of_microsoft_are_standard_ones(tmp_path: Path) -> None:
    nodes = "[q] q = com.microsoft.QuantizeLinear(x, xs, xz) [d] y = com.microsoft.DequantizeLinear"
    model = model_of("float[4,4] x", f"{nodes}(q, xs, xz)", {})
    feeds = random_feeds(model, 0)
    before = run_model(model, feeds)["y"]
    run_pass(DecomposeQuantizedOps(), model, tmp_path)
    assert {node.domain for node in model.graph} == {""}
    np.testing.assert_array_equal(run_model(model, feeds)["y"], before)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "channels-last": (
        "r = com.microsoft.QLinearGlobalAveragePool<channels_last=1>(q, xs, xz, ys, yz)",
        {},
        "channels are last",
    ),
    "old-softmax": (
        "r = com.microsoft.QLinearSoftmax<axis=1, opset=12>(q, xs, xz, ys, yz)",
        {},
        "an opset before 13",
    ),
    "several-scales": (
        "r = com.microsoft.QLinearSigmoid(q, ws, xz, ys, yz)",
        {"ws": np.full(4, 0.1, np.float32)},
        "has several scales",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, tmp_path: Path) -> None:
    op, extra, reason = REFUSED[name]
    model = model_of(IMAGE, f"{IN} [site] {op} {OUT}", extra)
    assert reason in only_skip(run_pass(DecomposeQuantizedOps(), model, tmp_path)).reason


def test_refuses_reordered_channels(tmp_path: Path) -> None:
    text = f"""{HEADER} g (float[3,16] x) => (float[3,8] y) {{
        [site] y = com.microsoft.MatMulNBits<K=16, N=8, bits=4, block_size=16>(x, w, s, , o) }}"""
    weights = {
        "w": codes(8, 1, 8, low=0, high=255, dtype=np.uint8),
        "s": np.ones(8, np.float32),
        "o": np.zeros(16, np.int32),
    }
    model = build(text, weights)
    reason = only_skip(run_pass(DecomposeQuantizedOps(), model, tmp_path)).reason
    assert reason == "its input channels are reordered (g_idx)"


def test_a_table_of_codes_is_decoded_before_the_lookup(tmp_path: Path) -> None:
    text = """g (int64[3] i) => (float[3,16] y) {
        [g] r = Gather(t, i) [d] d = DequantizeLinear(r, s, z) [e] y = Identity(d) }"""
    table = codes(10, 16, low=0, high=255, dtype=np.uint8)
    model = build(text, {"t": table, "s": np.float32(0.1), "z": np.uint8(100)})
    feeds = {"i": np.array([1, 7, 3])}
    before = run_model(model, feeds)["y"]
    run_pass(DecomposeQuantizedOps(), model, tmp_path)
    assert op_types(model) == ["DequantizeLinear", "Gather", "Identity"]
    np.testing.assert_array_equal(run_model(model, feeds)["y"], before)
    assert_idempotent(DecomposeQuantizedOps(), model, tmp_path)
