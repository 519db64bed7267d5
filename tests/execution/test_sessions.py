"""Loading and running models, and what failures look like."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import TargetError
from qcompiler.execution import sessions
from qcompiler.execution.sessions import open_session
from tests.support.graphs import build, random_array, serialized

WEIGHT = random_array(4, 3)
X = random_array(2, 4, seed=1)


def product() -> ir.Model:
    text = "g (float[b, 4] x) => (float[b, 3] y, float[b, 3] z) { y = MatMul(x, w) z = Neg(y) }"
    return build(text, {"w": WEIGHT})


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("form", ["file", "bytes", "model"])
def test_runs_every_form_of_a_model(form: str, optimize: bool, tmp_path: Path) -> None:
    model: Path | bytes | ir.Model = product()
    if form == "file":
        ir.save(product(), tmp_path / "m.onnx")
        model = tmp_path / "m.onnx"
    elif form == "bytes":
        model = serialized(product())
    with open_session(model, optimize=optimize, threads=1) as session:
        assert (session.input_names, session.output_names) == (("x",), ("y", "z"))
        outputs = session.run({"x": X})
    assert list(outputs) == ["y", "z"]
    np.testing.assert_allclose(outputs["y"], X @ WEIGHT, rtol=1e-5)
    np.testing.assert_array_equal(outputs["z"], -outputs["y"])


def test_external_weights_go_through_a_scratch_folder(tmp_path: Path) -> None:
    ir.save(product(), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    with open_session(ir.load(tmp_path / "m.onnx"), optimize=False, threads=1) as session:
        np.testing.assert_allclose(session.run({"x": X})["y"], X @ WEIGHT, rtol=1e-5)


def test_large_models_go_through_a_scratch_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_INLINE_LIMIT", 16)
    with open_session(product(), optimize=False, threads=1) as session:
        np.testing.assert_allclose(session.run({"x": X})["y"], X @ WEIGHT, rtol=1e-5)


def test_an_operator_without_kernel_names_its_node() -> None:
    text = "g (bfloat16[b, 4] x, bfloat16[4, 3] w) => (bfloat16[b, 3] y) { [odd] y = MatMul(x, w) }"
    with pytest.raises(TargetError, match="cannot load the model") as caught:
        open_session(build(text), optimize=False)
    assert caught.value.where == "odd"


def test_a_failing_run_names_its_node() -> None:
    text = "g (float[n] x, int64[m] s) => (float[a, b] y) { [bad] y = Reshape(x, s) }"
    with (
        open_session(build(text), optimize=False, threads=1) as session,
        pytest.raises(TargetError, match="failed to run") as caught,
    ):
        session.run({"x": np.ones(6, np.float32), "s": np.array([4, 4])})
    assert caught.value.where == "bad"


def test_a_missing_file_or_broken_model_is_a_target_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        open_session(tmp_path / "none.onnx", optimize=False)
    with pytest.raises(TargetError):
        open_session(b"not a model", optimize=False)


def test_a_missing_custom_op_library_is_a_target_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        open_session(product(), optimize=False, custom_op_libraries=[tmp_path / "none.so"])


def test_calls_are_cast_to_the_type_of_the_inputs() -> None:
    model = build("g (float16[N] x, int64[N] i) => (float16[N] y) { y = Neg(x) }")
    with open_session(model, optimize=False, threads=1) as session:
        found = session.fitting({"x": np.array([1], np.float32), "i": np.array([3])})
    assert [found[name].dtype.name for name in "xi"] == ["float16", "int64"]
