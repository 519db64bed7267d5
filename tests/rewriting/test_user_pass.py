"""Passes written by users, on either graph library."""

from pathlib import Path

import numpy as np
import pytest

from qcompiler.errors import UsageError
from qcompiler.ir.weights import WeightStore
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager
from qcompiler.rewriting.user_pass import RunUserPass
from tests.support.graphs import build, op_types, random_array
from tests.support.parity import run_model

_MODULE = """
import onnx_graphsurgeon as gs
import onnx_ir as ir


def relu_to_neg(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Relu":
            node.op_type = "Neg"


def relu_to_abs(graph: gs.Graph) -> gs.Graph:
    for node in graph.nodes:
        if node.op == "Relu":
            node.op = "Abs"
    return graph


def untyped(model):
    return model
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_user_passes.py").write_text(_MODULE)
    monkeypatch.chdir(tmp_path)
    return "my_user_passes"


_TEXT = "g (float[2, 4] x) => (float[2, 3] y) { [a] h = Relu(x) [b] y = MatMul(h, w) }"


@pytest.mark.parametrize(("function", "op"), [("relu_to_neg", "Neg"), ("relu_to_abs", "Abs")])
def test_a_function_rewrites_the_model(module: str, function: str, op: str, tmp_path: Path) -> None:
    model = build(_TEXT, {"w": random_array(4, 3)})
    model.metadata_props["qcompiler.stage"] = "canonical"
    PassManager(PassContext(WeightStore(tmp_path))).run(
        model, [RunUserPass(f"{module}:{function}")]
    )
    assert op_types(model) == [op, "MatMul"]
    x = -np.ones((2, 4), np.float32)
    expected = np.ones((2, 4), np.float32) @ random_array(4, 3)
    np.testing.assert_allclose(run_model(model, {"x": x})["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("my_user_passes", "is not of the form module:function"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("my_user_passes:nothing", "has no function nothing"),
        ("my_user_passes:untyped", "must be annotated as onnx_ir.Model or"),
    ],
)
def test_bad_references_are_refused(module: str, reference: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunUserPass(reference)
