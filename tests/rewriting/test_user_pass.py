"""Passes written by users, on either graph library."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import UsageError
from qcompiler.ir.weights import WeightStore
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager
from qcompiler.rewriting.snapshots import KeepReproducer
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


def nothing():
    return None


def in_quotes(graph: "gs.Graph") -> "gs.Graph":
    return relu_to_abs(graph)


def other_type(graph: int) -> None:
    pass


def unknown_name(graph: "tp.Graph") -> None:
    pass


def crash(model: ir.Model) -> None:
    raise KeyError("surprise")


def crash_on_graph(graph: gs.Graph) -> None:
    raise KeyError("surprise")


def broken_graph(graph: gs.Graph) -> None:
    graph.nodes[0].inputs = [1]


def illegal_attribute(model: ir.Model) -> None:
    model.graph[0].attributes["surprise"] = ir.AttrInt64("surprise", 1)


def disconnect(model: ir.Model) -> None:
    model.graph.remove(model.graph[0])


class Callable:
    def __call__(self, model: ir.Model) -> None:
        relu_to_neg(model)


an_object = Callable()
"""

_POSTPONED = """
from __future__ import annotations

import onnx_graphsurgeon as gs
import onnx_ir


def change(first: onnx_ir.Model) -> None:
    first.graph[0].op_type = "Neg"


def change_graph(first: gs.Graph) -> None:
    first.nodes[0].op = "Abs"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_user_passes.py").write_text(_MODULE)
    (tmp_path / "my_postponed_passes.py").write_text(_POSTPONED)
    (tmp_path / "my_broken_module.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    return "my_user_passes"


_TEXT = "g (float[2, 4] x) => (float[2, 3] y) { [a] h = Relu(x) [b] y = MatMul(h, w) }"


def _model() -> ir.Model:
    model = build(_TEXT, {"w": random_array(4, 3)})
    model.metadata_props["qcompiler.stage"] = "canonical"
    return model


@pytest.mark.parametrize(
    ("reference", "op"),
    [
        ("my_user_passes:relu_to_neg", "Neg"),
        ("my_user_passes:relu_to_abs", "Abs"),
        ("my_user_passes:in_quotes", "Abs"),
        ("my_user_passes:an_object", "Neg"),
        ("my_postponed_passes:change", "Neg"),
        ("my_postponed_passes:change_graph", "Abs"),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_function_rewrites_the_model(reference: str, op: str, tmp_path: Path) -> None:
    model = _model()
    PassManager(PassContext(WeightStore(tmp_path))).run(model, [RunUserPass(reference)])
    assert op_types(model) == [op, "MatMul"]
    x = -np.ones((2, 4), np.float32)
    expected = np.ones((2, 4), np.float32) @ random_array(4, 3)
    np.testing.assert_allclose(run_model(model, {"x": x})["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("my_user_passes", "is not of the form module:function"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("my_user_passes:absent", "has no function absent"),
        ("my_user_passes:untyped", "must be annotated as onnx_ir.Model or .*without annotation"),
        ("my_user_passes:nothing", "must be annotated as onnx_ir.Model or .*without annotation"),
        ("my_user_passes:other_type", "must be annotated as .*it is <class 'int'>"),
        ("my_user_passes:unknown_name", "cannot be read: NameError: name 'tp' is not defined"),
        ("my_broken_module:f", "cannot import my_broken_module: ZeroDivisionError"),
    ],
)
@pytest.mark.usefixtures("module")
def test_bad_references_are_refused(reference: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunUserPass(reference)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("crash", "failed with KeyError: 'surprise'"),
        ("crash_on_graph", "failed with KeyError: 'surprise'"),
        ("broken_graph", "failed with "),
        ("illegal_attribute", "ONNX's checker refuses the model: .*surprise"),
        ("disconnect", r"left an illegal model: \[use-def\] b \(MatMul\)"),
    ],
)
def test_the_users_faults_are_usage_errors_that_name_the_function(
    module: str, function: str, message: str, tmp_path: Path
) -> None:
    reference = f"{module}:{function}"
    rewrite = RunUserPass(reference)
    manager = PassManager(PassContext(WeightStore(tmp_path)), [KeepReproducer(tmp_path / "kept")])
    with pytest.raises(UsageError, match=message) as caught:
        manager.run(_model(), [rewrite])
    assert caught.value.where == f"--user-pass {reference}"
    assert not (tmp_path / "kept").exists()
