"""The pass manager: order, verification, hooks, and what a defect turns into."""

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler.errors import InternalError, ModelError, UsageError
from qcompiler.ir.provenance import STAGE
from qcompiler.ir.weights import WeightStore
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.manager import PassManager, stage_of
from qcompiler.rewriting.snapshots import DumpModels, KeepReproducer
from qcompiler.rewriting.stages import Stage
from tests.support.graphs import build


class Rename(Pass):
    """A pass that does nothing wrong."""

    name = "rename"
    consumes = Stage.IMPORTED
    produces = Stage.IMPORTED
    numerics = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        model.graph[0].name = "renamed"
        return PassResult((Rewrite("rename", "renamed"),))


class Canonicalize(Rename):
    name = "canonicalize"
    produces = Stage.CANONICAL


class Disconnect(Rename):
    """Removes a node whose output is still read."""

    name = "disconnect"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        model.graph.remove(model.graph[0])
        return PassResult((Rewrite("disconnect", ""),))


class Crash(Rename):
    name = "crash"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        message = "surprise"
        raise KeyError(message)


class Refuse(Rename):
    name = "refuse"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        message = "cannot be compiled"
        raise ModelError(message, where="node a")


class LoseOutput(Rename):
    name = "lose-output"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        model.graph.outputs.clear()
        return PassResult((Rewrite("lose-output", ""),))


def _model() -> ir.Model:
    return build("g (float[1] x) => (float[1] y) { [a] h = Relu(x) [b] y = Neg(h) }")


def _manager(folder: Path, *hooks: DumpModels | KeepReproducer) -> PassManager:
    return PassManager(PassContext(WeightStore(folder)), hooks)


def test_records_say_what_every_pass_did(tmp_path: Path) -> None:
    model = _model()
    records = _manager(tmp_path).run(model, [Rename(), Canonicalize()])
    assert [(r.name, r.stage, len(r.rewrites)) for r in records] == [
        ("rename", Stage.IMPORTED, 1),
        ("canonicalize", Stage.CANONICAL, 1),
    ]
    assert model.metadata_props[STAGE] == "canonical"


def test_a_stage_is_never_lowered(tmp_path: Path) -> None:
    model = _model()
    _manager(tmp_path).run(model, [Canonicalize(), Rename()])
    assert stage_of(model) is Stage.CANONICAL


def test_a_pass_that_needs_a_later_stage_is_refused(tmp_path: Path) -> None:
    class Late(Rename):
        name = "late"
        consumes = Stage.ASSIGNED

    with pytest.raises(UsageError, match="needs a model at stage assigned, and this one is at"):
        _manager(tmp_path).run(_model(), [Late()])


def test_an_unknown_stage_is_refused() -> None:
    model = _model()
    model.metadata_props[STAGE] = "frozen"
    with pytest.raises(UsageError, match="'frozen', which this version does not know"):
        stage_of(model)


def test_a_disconnected_graph_is_found(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"\[use-def\] b \(Neg\): input 0 \(h\) is not defined"):
        _manager(tmp_path).run(_model(), [Disconnect()])


def test_a_changed_signature_is_found(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="changed the model's signature"):
        _manager(tmp_path).run(_model(), [LoseOutput()])


def test_a_crash_becomes_an_internal_error_that_names_the_pass(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="pass crash: failed with KeyError: 'surprise'"):
        _manager(tmp_path).run(_model(), [Crash()])


def test_a_refusal_is_passed_on_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="node a: cannot be compiled"):
        _manager(tmp_path, KeepReproducer(tmp_path)).run(_model(), [Refuse()])
    assert not list(tmp_path.iterdir())


def test_a_defect_leaves_a_reproducer(tmp_path: Path) -> None:
    manager = _manager(tmp_path, KeepReproducer(tmp_path))
    with pytest.raises(InternalError, match=r"qcompile run-pass disconnect model\.onnx"):
        manager.run(_model(), [Rename(), Disconnect()])
    folder = tmp_path / "qcompiler-reproducer-disconnect"
    before = ir.load(folder / "model.onnx")
    assert [node.name for node in before.graph] == ["renamed", "b"]
    assert json.loads((folder / "reproduce.json").read_text())["pass"] == "disconnect"


def test_every_intermediate_can_be_dumped(tmp_path: Path) -> None:
    _manager(tmp_path, DumpModels(tmp_path / "dump")).run(_model(), [Rename(), Canonicalize()])
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert names == ["00-rename.onnx", "01-canonicalize.onnx"]
    assert ir.load(tmp_path / "dump" / names[0]).graph[0].name == "renamed"


class Retype(Rename):
    """Lets the model take and return float16; may be told to rename an input as well."""

    name = "retype"

    def __init__(self, *, declared: bool, renamed: bool = False) -> None:
        self.retypes_signature = declared
        self._renamed = renamed

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.type = ir.TensorType(ir.DataType.FLOAT16)
        if self._renamed:
            model.graph.inputs[0].name = "other"
        return PassResult((Rewrite("retype", "a"),))


def test_only_a_pass_that_says_so_changes_float_types_of_the_signature(tmp_path: Path) -> None:
    text = "g (float[2] x) => (float[2] y) { [a] y = Neg(x) }"
    with WeightStore(tmp_path) as store:
        manager = PassManager(PassContext(store))
        manager.run(build(text), [Retype(declared=True), Rename()])
        with pytest.raises(InternalError, match="changed the model's signature"):
            manager.run(build(text), [Retype(declared=False)])
        with pytest.raises(InternalError, match="changed the model's signature"):
            manager.run(build(text), [Retype(declared=True, renamed=True)])
        with pytest.raises(InternalError, match="changed the model's signature"):
            manager.run(build(text), [Retype(declared=True), *_back()])


def _back() -> list[Pass]:
    class Widen(Rename):
        name = "widen"

        def run(self, model: ir.Model, context: PassContext) -> PassResult:
            model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            return PassResult((Rewrite("widen", "a"),))

    return [Widen()]
