"""A user's measure of a model, and the bound made of it."""

from pathlib import Path

import numpy as np
import pytest

from qcompiler.calibration.metric import find_metric, output_bound
from qcompiler.errors import UsageError
from tests.support.graphs import build, random_array

CODE = """
import numpy as np
def size(run):
    return np.abs(run({"x": np.ones((1, 4), np.float32)})["y"]).sum()
def broken(run):
    return run({})["z"]
def nothing(run):
    return float("nan")
value = 1
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"metric_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_function_runs_the_model(module: str) -> None:
    weights = random_array(4, 3)
    model = build("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", {"w": weights})
    expected = float(np.abs(np.ones((1, 4), np.float32) @ weights).sum())
    assert find_metric(f"{module}:size").of(model) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("function", "text"),
    [("nothing", "returned nan"), ("broken", "ONNX Runtime failed|failed with")],
)
def test_faults_of_the_function_are_usage_errors(module: str, function: str, text: str) -> None:
    model = build("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    with pytest.raises(Exception, match=text):
        find_metric(f"{module}:{function}").of(model)


@pytest.mark.parametrize("reference", ["nowhere", "nowhere:f", ":f"])
def test_what_does_not_exist_is_named(reference: str) -> None:
    with pytest.raises(UsageError, match=r"module:function|cannot import"):
        find_metric(reference)


def test_bounds_say_how_they_were_asked_for(module: str) -> None:
    bound = output_bound(20, None, None)
    assert bound is not None
    assert bound.option == "--min-output-sqnr 20"
    bound = output_bound(None, f"{module}:size", 0.01)
    assert bound is not None
    assert bound.option == "--max-metric-drop 0.01"
    assert output_bound(None, None, None) is None


def test_options_that_do_not_fit_are_refused(module: str) -> None:
    with pytest.raises(UsageError, match="belong together"):
        output_bound(None, f"{module}:size", None)
    with pytest.raises(UsageError, match="is no drop"):
        output_bound(None, f"{module}:size", -1.0)
    with pytest.raises(UsageError, match="no number of decibels"):
        output_bound(float("nan"), None, None)
    with pytest.raises(UsageError, match="has no function value"):
        find_metric(f"{module}:value")
