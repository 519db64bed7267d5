"""Graphs of 16-bit floats, run in float32 with every value rounded as it is stored."""

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.execution.narrow_floats import emulated, has_bfloat16, has_narrow_floats, runnable
from qcompiler.execution.sessions import open_session
from qcompiler.ir.shapes import infer_shapes
from tests.support.graphs import build
from tests.support.parity import run_model

SQUARE_ROOT = "(float16[2] x) => (float16[2] y) { s = Mul(x, x) y = Sqrt(s) }"
PRODUCT = "(bfloat16[1, 2] x) => (bfloat16[1, 1] y) { y = MatMul(x, w) }"
X = np.array([300.0, 3.0], np.float16)


def weight() -> dict[str, object]:
    return {"w": np.array([[1.0], [2.0**-9]], ml_dtypes.bfloat16)}


def test_an_overflow_shows_that_onnx_runtime_hides() -> None:
    model = build(f"g {SQUARE_ROOT}")
    infer_shapes(model)
    assert run_model(model, {"x": X})["y"].tolist() == [300.0, 3.0]
    found = run_model(emulated(model), {"x": X.astype(np.float32)})["y"]
    assert found.tolist() == [np.inf, 3.0]
    assert found.dtype == np.float32


def test_bfloat16_runs_and_its_results_are_rounded() -> None:
    model = build(f"g {PRODUCT}", weight())
    with pytest.raises(TargetError):
        open_session(model, optimize=False)
    assert runnable(model) is not model
    found = run_model(runnable(model), {"x": np.ones((1, 2), np.float32)})["y"]
    assert found.tolist() == [[1.0]]  # 1 + 2^-9 has no bfloat16 of its own


def test_which_models_need_it() -> None:
    wide = build("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    half, brain = build(f"g {SQUARE_ROOT}"), build(f"g {PRODUCT}", weight())
    assert [has_narrow_floats(m) for m in (wide, half, brain)] == [False, True, True]
    assert [has_bfloat16(m) for m in (wide, half, brain)] == [False, False, True]
    assert runnable(half) is half


def test_the_model_stays_as_it_is() -> None:
    model = build(f"g {PRODUCT}", weight())
    emulated(model)
    assert has_bfloat16(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]
