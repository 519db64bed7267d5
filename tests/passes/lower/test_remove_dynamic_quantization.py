"""Products of data that is rounded at each run become products of floats and decoded weights."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.passes.lower.remove_dynamic_quantization import RemoveDynamicQuantization
from tests.support.calibrated import distance_db
from tests.support.graphs import build, op_types, random_array
from tests.support.parity import random_feeds, run_model
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

GENERATOR = np.random.default_rng(0)
PRODUCT = """g (float[3,32] x) => (float[3,8] y) {
    q, s, z = DynamicQuantizeLinear(x) [m] i = MatMulInteger(q, w, z, wz)
    c = Cast<to=1>(i) k = Mul(s, ws) y = Mul(c, k) }"""
CONV = """g (float[1,4,6,6] x) => (float[1,8,6,6] y) {
    q, s, z = DynamicQuantizeLinear(x) [m] i = ConvInteger<pads=[1,1,1,1]>(q, w, z, wz)
    c = Cast<to=1>(i) k = Mul(ws, s) y = Mul(k, c) }"""


def levels(low: int, high: int, dtype: Any, *shape: int) -> Any:
    return GENERATOR.integers(low, high + 1, shape).astype(dtype)


COLUMNS = np.linspace(0.01, 0.02, 8, dtype=np.float32)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8-columns": (
        PRODUCT,
        {"w": levels(-64, 64, np.int8, 32, 8), "wz": np.zeros(8, np.int8), "ws": COLUMNS},
    ),
    "uint8-tensor": (
        PRODUCT,
        {"w": levels(64, 190, np.uint8, 32, 8), "wz": np.uint8(120), "ws": np.float32(0.02)},
    ),
    "scales-without-points": (
        PRODUCT.replace("w, z, wz", "w, z"),
        {"w": levels(-64, 64, np.int8, 32, 8), "ws": COLUMNS},
    ),
    "one-point-for-all-columns": (
        PRODUCT,
        {"w": levels(-64, 64, np.int8, 32, 8), "wz": np.int8(3), "ws": COLUMNS},
    ),
    "conv": (
        CONV,
        {"w": levels(64, 190, np.uint8, 8, 4, 3, 3), "wz": np.uint8(120), "ws": np.float32(0.02)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_multiplies_floats_by_the_same_weights(name: str, tmp_path: Path) -> None:
    text, weights = CASES[name]
    model = build(text, weights)
    feeds = random_feeds(model, 0)
    before = run_model(model, feeds)["y"]
    run_pass(RemoveDynamicQuantization(), model, tmp_path)
    assert op_types(model) == ["DequantizeLinear", "Conv" if name == "conv" else "MatMul"]
    after = run_model(model, feeds)["y"]
    assert distance_db(after, before) > 35, "what the rounding of the data cost"
    if name != "conv":
        codes = weights["w"].astype(np.float64) - np.asarray(weights.get("wz", 0), np.float64)
        exact = feeds["x"].astype(np.float64) @ (codes * weights["ws"])
        np.testing.assert_allclose(after, exact, rtol=1e-4, atol=1e-4)
    assert_idempotent(RemoveDynamicQuantization(), model, tmp_path)


def test_one_rounding_for_several_products_goes_with_the_last(tmp_path: Path) -> None:
    text = """g (float[3,32] x) => (float[3,8] y, float[3,8] v) {
        q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) j = MatMulInteger(q, w, z)
        c = Cast<to=1>(i) k = Mul(s, ws) y = Mul(c, k)
        d = Cast<to=1>(j) l = Mul(s, ws) v = Mul(d, l) }"""
    model = build(text, {"w": levels(-64, 64, np.int8, 32, 8), "ws": COLUMNS})
    run_pass(RemoveDynamicQuantization(), model, tmp_path)
    assert op_types(model) == ["DequantizeLinear", "MatMul"] * 2


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "other-data": (
        """g (uint8[3,32] x) => (int32[3,8] y) { [m] y = MatMulInteger(x, w) }""",
        {},
        "its data is not rounded by a DynamicQuantizeLinear",
    ),
    "other-zero-point": (
        PRODUCT.replace("(q, w, z, wz)", "(q, w)"),
        {"ws": COLUMNS},
        "the zero point of its data is another one",
    ),
    "sums-are-read": (
        PRODUCT.replace("(float[3,8] y)", "(float[3,8] y, int32[3,8] i)").replace("z, wz", "z"),
        {"ws": COLUMNS},
        "its sums are not cast and scaled right away",
    ),
    "another-scale": (
        PRODUCT.replace("k = Mul(s, ws)", "k = Mul(s, s)").replace("z, wz", "z"),
        {},
        "its scale is not that of its data times that of its weight",
    ),
    "a-scale-for-each-row": (
        PRODUCT.replace("z, wz", "z"),
        {"ws": random_array(3, 8) ** 2 + 1},
        "its weight has scales that are not those of its columns",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, tmp_path: Path) -> None:
    text, weights, reason = REFUSED[name]
    model: ir.Model = build(text, {"w": levels(-64, 64, np.int8, 32, 8)} | weights)
    assert only_skip(run_pass(RemoveDynamicQuantization(), model, tmp_path)).reason == reason
