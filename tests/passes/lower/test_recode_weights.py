"""Constant codes become signed ones without zero points, or floats, with the same values."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.passes.lower.recode_weights import RecodeWeights
from tests.support.graphs import build, node_named, op_types
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

BLOCKED = "[d] w = DequantizeLinear<axis=0, block_size={0}>(c, s, z)"
CHANNELS = "[d] w = DequantizeLinear<axis=1>(c, s, z)"


def tensor(values: Any, dtype: str) -> ir.TensorProtocol:
    element = ir.DataType[dtype]
    return ir.tensor(np.asarray(values).astype(element.numpy()), dtype=element)


def levels(low: int, high: int, *shape: int) -> Any:
    values = np.random.default_rng(0).integers(low, high + 1, shape)
    values.flat[0], values.flat[1] = low, high
    return values


def product(nodes: str, dtype: str, codes: Any, zeros: Any, scale: Any = None) -> ir.Model:
    shape = np.shape(zeros)
    weights = {
        "c": tensor(codes, dtype),
        "z": tensor(zeros, dtype),
        "s": scale if scale is not None else np.linspace(0.1, 0.2, np.prod(shape, dtype=int),
                                                         dtype=np.float32).reshape(shape),
    }  # fmt: skip
    text = f"g (float[3, 32] x) => (float[3, 8] y) {{ {nodes} y = MatMul(x, w) }}"
    return build(text, weights, opset=25)


BY_BLOCK = (2, 8)
CASES: dict[str, tuple[ir.Model, str]] = {
    "uint8-middle": (product(CHANNELS, "UINT8", levels(0, 255, 32, 8), np.full(8, 128)), "INT8"),
    "uint8-low": (product(CHANNELS, "UINT8", levels(0, 127, 32, 8), np.zeros(8)), "INT8"),
    "int8-shifted": (product(CHANNELS, "INT8", levels(-100, 100, 32, 8), np.full(8, -20)), "INT8"),
    "uint4-middle": (
        product(BLOCKED.format(16), "UINT4", levels(0, 15, 32, 8), np.full(BY_BLOCK, 8)),
        "INT4",
    ),
    "uint4-free": (
        product(BLOCKED.format(16), "UINT4", levels(0, 15, 32, 8), levels(0, 15, *BY_BLOCK)),
        "INT8",
    ),
    "uint2": (
        product(BLOCKED.format(16), "UINT2", levels(0, 3, 32, 8), levels(0, 3, *BY_BLOCK)),
        "INT4",
    ),
    "int2": (product(CHANNELS, "INT2", levels(-2, 1, 32, 8), np.zeros(8)), "INT4"),
}


@pytest.mark.parametrize("name", CASES)
def test_stores_signed_codes(name: str, tmp_path: Path) -> None:
    model, dtype = CASES[name]
    before = ir.from_proto(ir.to_proto(model))
    result = run_pass(RecodeWeights(), model, tmp_path)
    assert result.skips == ()
    node = node_named(model, "d")
    assert node.inputs[0] is not None
    assert node.inputs[0].dtype == ir.DataType[dtype]
    assert len(node.inputs) == 2
    assert len(model.graph.initializers) == 2
    assert_parity(before, model, tolerance=0)
    assert_idempotent(RecodeWeights(), model, tmp_path)


DECODED: dict[str, tuple[ir.Model, str]] = {
    "uint8-wide": (
        product(CHANNELS, "UINT8", levels(0, 255, 32, 8), np.full(8, 100)),
        "codes less zero points go from -100 to 155, and int8 holds -128 to 127",
    ),
    "short-block": (
        product(BLOCKED.format(20), "INT4", levels(-8, 7, 32, 8), np.zeros(BY_BLOCK)),
        "blocks of 20 do not divide the 32 elements of axis 0",
    ),
    "float8e5m2": (
        product(
            "[d] w = DequantizeLinear(c, s, z)", "FLOAT8E5M2", levels(-8, 7, 32, 8), np.float32(0)
        ),
        "FLOAT8E5M2 is no type of weights",
    ),
}


@pytest.mark.parametrize("name", DECODED)
def test_decodes_what_no_type_holds(name: str, tmp_path: Path) -> None:
    model, reason = DECODED[name]
    before = ir.from_proto(ir.to_proto(model))
    result = run_pass(RecodeWeights(), model, tmp_path)
    assert [skip.reason for skip in result.skips] == [f"stored as floats: {reason}"]
    assert op_types(model) == ["MatMul"]
    assert_parity(before, model, tolerance=0)
    assert_idempotent(RecodeWeights(), model, tmp_path)


def test_decodes_biases(tmp_path: Path) -> None:
    text = """g (float[3, 8] x) => (float[3, 8] y) {
        [d] b = DequantizeLinear<axis=0>(c, s) y = Add(x, b) }"""
    weights = {
        "c": levels(-(1 << 30), 1 << 30, 8).astype(np.int32),
        "s": np.linspace(1e-6, 2e-6, 8, dtype=np.float32),
    }
    model, before = build(text, weights), build(text, weights)
    result = run_pass(RecodeWeights(), model, tmp_path)
    assert "INT32 is no type of weights" in result.skips[0].reason
    assert op_types(model) == ["Add"]
    assert_parity(before, model, tolerance=0)


def test_leaves_legal_codes_alone(tmp_path: Path) -> None:
    model = product(CHANNELS, "INT8", levels(-127, 127, 32, 8), np.zeros(8))
    result = run_pass(RecodeWeights(), model, tmp_path)
    assert (result.rewrites, result.skips) == ((), ())


def test_refuses_a_computed_scale(tmp_path: Path) -> None:
    text = """g (float[3, 32] x, float s) => (float[3, 8] y) {
        [d] w = DequantizeLinear(c, s, z) y = MatMul(x, w) }"""
    weights = {"c": levels(0, 255, 32, 8).astype(np.uint8), "z": np.uint8(128)}
    reason = only_skip(run_pass(RecodeWeights(), build(text, weights), tmp_path)).reason
    assert reason == "its scale or zero point is computed at run time"


def test_codes_that_two_ops_decode_stay_one_tensor(tmp_path: Path) -> None:
    text = """g (float[3, 32] x) => (float[3, 8] y, float[3, 8] v) {
        w = DequantizeLinear<axis=1>(c, s, z) y = MatMul(x, w)
        u = DequantizeLinear<axis=1>(c, t, z) v = MatMul(x, u) }"""
    weights = {
        "c": tensor(levels(0, 255, 32, 8), "UINT8"),
        "z": tensor(np.full(8, 128), "UINT8"),
        "s": np.full(8, 0.1, np.float32),
        "t": np.full(8, 0.2, np.float32),
    }
    model, before = build(text, weights), build(text, weights)
    run_pass(RecodeWeights(), model, tmp_path)
    assert set(model.graph.initializers) == {"c.int8", "s", "t"}
    assert_parity(before, model, tolerance=0)
