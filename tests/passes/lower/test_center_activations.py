"""Codes of activations become int8 without a zero point."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.passes.lower.center_activations import CenterActivations
from tests.support.graphs import build, initializer, node_named, op_types
from tests.support.parity import run_model
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

TEXT = """g (float[n, 8] x) => (float[n, 8] y) {
    [q] q = QuantizeLinear(x, s, z) [d] y = DequantizeLinear(q, s, z) }"""
X = {"x": np.linspace(-40, 40, 4096, dtype=np.float32).reshape(-1, 8)}
STEP = np.float32(0.1)


def pair(zero: int, dtype: Any) -> ir.Model:
    return build(TEXT, {"s": STEP, "z": np.array(zero, dtype)})


def test_a_zero_point_in_the_middle_goes_without_loss(tmp_path: Path) -> None:
    model = pair(128, np.uint8)
    before = run_model(model, X)["y"]
    result = run_pass(CenterActivations(), model, tmp_path)
    assert result.skips == ()
    assert op_types(model) == ["QuantizeLinear", "DequantizeLinear"]
    assert node_named(model, "q").outputs[0].dtype == ir.DataType.INT8
    np.testing.assert_array_equal(run_model(model, X)["y"], before)
    assert_idempotent(CenterActivations(), model, tmp_path)


@pytest.mark.parametrize(
    ("zero", "dtype", "growth"),
    [(0, np.uint8, 255 / 127), (255, np.uint8, 255 / 128), (100, np.uint8, 155 / 127),
     (10, np.int8, 138 / 128), (-128, np.int8, 255 / 127)],
)  # fmt: skip
def test_other_zero_points_cost_at_most_a_bit(
    zero: int, dtype: Any, growth: float, tmp_path: Path
) -> None:
    model = pair(zero, dtype)
    before = run_model(model, X)["y"]
    result = run_pass(CenterActivations(), model, tmp_path)
    assert result.skips[0].reason.endswith(f"they are now {growth:.2f} times as large")
    assert op_types(model) == ["Clip", "QuantizeLinear", "DequantizeLinear"]
    scale = float(initializer(model, "q.scale"))
    assert scale == pytest.approx(STEP * growth)
    after = run_model(model, X)["y"]
    assert np.abs(after - before).max() <= (scale + STEP) / 2 * 1.001
    # What saturated saturates at the same number, such as the 0 of a Relu.
    assert after.min() == pytest.approx(before.min(), abs=scale / 2)
    assert after.max() == pytest.approx(before.max(), abs=scale / 2)
    assert_idempotent(CenterActivations(), model, tmp_path)


def test_an_absent_zero_point_is_uint8(tmp_path: Path) -> None:
    text = """g (float[n, 8] x) => (float[n, 8] y) {
        [q] q = QuantizeLinear(x, s) y = DequantizeLinear(q, s) }"""
    model = build(text, {"s": STEP})
    before = run_model(model, X)["y"]
    run_pass(CenterActivations(), model, tmp_path)
    after = run_model(model, X)["y"]
    assert before.min() == after.min() == 0
    assert np.abs(after - before).max() < 0.16


def test_all_readers_get_the_new_codes(tmp_path: Path) -> None:
    text = """g (float[n, 8] x) => (float[n, 8] y, float[n, 8] v) {
        [q] q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)
        v = DequantizeLinear(q, t, k) }"""
    model = build(text, {"s": STEP, "z": np.uint8(7), "t": STEP, "k": np.uint8(7)})
    run_pass(CenterActivations(), model, tmp_path)
    found = run_model(model, X)
    np.testing.assert_array_equal(found["y"], found["v"])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "16-bit": (TEXT, {"s": STEP, "z": np.uint16(7)}, "int8 does not hold codes of UINT16"),
    "per-channel": (
        TEXT.replace("QuantizeLinear(", "QuantizeLinear<axis=1>("),
        {"s": np.full(8, 0.1, np.float32), "z": np.full(8, 7, np.uint8)},
        "it has several scales",
    ),
    "computed": (
        TEXT.replace("float[n, 8] x", "float[n, 8] x, float s"),
        {"z": np.uint8(7)},
        "its scale or zero point is computed at run time",
    ),
    "codes-are-moved": (
        TEXT.replace("[d] y = DequantizeLinear(q", "[t] t = Flatten(q) y = DequantizeLinear(t"),
        {"s": STEP, "z": np.uint8(7)},
        "its codes are also read by t (Flatten)",
    ),
    "codes-are-an-output": (
        TEXT.replace("(float[n, 8] y)", "(float[n, 8] y, uint8[n, 8] q)"),
        {"s": STEP, "z": np.uint8(7)},
        "its codes are an output of the model",
    ),
    "another-grid": (
        TEXT.replace("DequantizeLinear(q, s, z)", "DequantizeLinear(q, s, k)"),
        {"s": STEP, "z": np.uint8(7), "k": np.uint8(8)},
        "d decodes its codes on another grid",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, tmp_path: Path) -> None:
    text, weights, reason = REFUSED[name]
    model = build(text, weights)
    assert only_skip(run_pass(CenterActivations(), model, tmp_path)).reason == reason
