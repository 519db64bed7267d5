"""Samples from a Python function of the user's."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import SampleOptions, Samples
from qcompiler.calibration.samples import open_samples
from qcompiler.errors import UsageError
from tests.support.graphs import build

MODULE = """
import numpy as np

def call(i):
    return {"x": np.full((i + 1, 4), i, np.float64), "ids": list(range(i + 1))}

def generated():
    for i in range(3):
        yield call(i)

def listed():
    return [call(i) for i in range(3)]

def told(inputs):
    assert inputs["x"] == (np.dtype("float32"), ("b", 4)), inputs
    return [{name: np.ones((2, *shape[1:]), dtype) for name, (dtype, shape) in inputs.items()}]

def optional(inputs=None):
    assert inputs is None
    return listed()

drawn = np.random.default_rng(0)

def unseeded():
    for _ in range(2):
        yield {"x": drawn.standard_normal((1, 4)), "ids": [1]}

times = []

def shrinking():
    times.append(1)
    return [call(0)] * (4 - len(times))

def lying():
    class Lying:
        def __len__(self): return 5
        def __iter__(self): return iter([call(0)])
    return Lying()

def failing():
    yield call(0)
    raise KeyError("lost")

def empty(): return []
def mapping(): return call(0)
def number(): return 3
def wrong_call(): return [3]
def none_call(): return [None]
def wrong_name(): return [{"y": 1.0}]
constant = 3
"""


def _model() -> ir.Model:
    return build("g (float[b, 4] x, int64[b] ids) => (float y) { y = Constant<value_float=1.0>() }")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> str:
    name = "source_" + re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def _open(source: str, **options: Any) -> Samples:
    return open_samples(source, _model(), SampleOptions(**options))


def _refusal(source: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        list(_open(source))
    return caught.value


@pytest.mark.parametrize("function", ["generated", "listed", "optional"])
def test_calls_are_read_again_and_again(function: str, module: str) -> None:
    samples = _open(f"{module}:{function}")
    for _ in range(2):
        calls = list(samples)
        assert [feeds["x"].shape for feeds in calls] == [(1, 4), (2, 4), (3, 4)]
        assert calls[2]["x"].dtype == np.dtype(np.float32)
        assert calls[2]["ids"].tolist() == [0, 1, 2]
    assert samples.origin == f"3 calls from {module}:{function}"


@pytest.mark.parametrize("function", ["generated", "listed"])
def test_max_samples_stops_the_iteration(function: str, module: str) -> None:
    samples = _open(f"python:{module}:{function}", max_samples=2)
    assert len(samples) == len(list(samples)) == len(list(samples)) == 2


def test_a_function_with_a_parameter_is_told_the_inputs(module: str) -> None:
    (feeds,) = _open(f"{module}:told")
    assert feeds["x"].shape == (2, 4)
    assert feeds["ids"].dtype == np.dtype(np.int64)


def test_data_that_differs_between_readings_is_refused(module: str) -> None:
    error = _refusal(f"{module}:unseeded")
    assert error.message == "call 0 is not what it was when it was first read"
    assert (
        error.hint == "the function must return the same calls each time: seed what is random in it"
    )


def test_fewer_calls_than_before_are_refused(module: str) -> None:
    assert _refusal(f"{module}:shrinking").message == "returns 2 calls, and returned 3 before"


def test_a_length_that_is_not_true_is_refused(module: str) -> None:
    assert _refusal(f"{module}:lying").message == "returns 1 call, and returned 5 before"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("failing", "failed with KeyError: 'lost'"),
        ("empty", "returns no call"),
        ("mapping", "returns dict, and not an iterable of calls"),
        ("number", "returns int, and not an iterable of calls"),
        ("wrong_call", "is int, and not a map of input names to arrays"),
        ("none_call", "is NoneType, and not a map of input names to arrays"),
        ("wrong_name", "holds y float64[], and the model takes x float32[b, 4], ids int64[b]"),
    ],
)
def test_faults_of_the_function_are_told(function: str, message: str, module: str) -> None:
    error = _refusal(f"{module}:{function}")
    assert error.message == message
    assert error.where
    assert error.where.startswith(f"{module}:{function}")


@pytest.mark.parametrize("function", ["nothing", "constant"])
def test_a_function_that_is_not_there_is_refused_with_those_that_are(
    function: str, module: str
) -> None:
    error = _refusal(f"{module}:{function}")
    assert error.message == f"{module} has no function {function}"
    assert error.hint
    assert "generated" in error.hint


def test_a_module_that_is_not_there_is_refused() -> None:
    message = _refusal("no_such_module_here:calls").message
    assert message.startswith("cannot import no_such_module_here: ModuleNotFoundError")


def test_a_reference_without_function_is_refused() -> None:
    assert "is not of the form module:function" in _refusal("python:module").message
