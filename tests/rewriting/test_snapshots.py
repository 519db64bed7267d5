"""Dumps and reproducers: what is kept, and that the command replays it."""

import json
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qcompiler.cli.main import main
from qcompiler.errors import InternalError
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions
from qcompiler.passes.canonicalize.eliminate_dead import EliminateDead
from qcompiler.passes.canonicalize.fold_constants import FoldConstants, FoldConstantsOptions
from qcompiler.pipeline import pass_named
from qcompiler.plan import make_plan
from qcompiler.quant.scheme import FLOAT
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.manager import PassManager
from qcompiler.rewriting.snapshots import KeepReproducer
from qcompiler.rewriting.stages import Stage
from tests.support.graphs import build, op_types, random_array

_TEXT = "g (float[2, 4] x) => (float[2, 3] y) { [a] h = Relu(x) [b] y = MatMul(h, w) }"


def _model() -> ir.Model:
    return build(_TEXT, {"w": random_array(4, 3)})


def _disconnect(self: Pass, model: ir.Model, context: PassContext) -> PassResult:
    model.graph.remove(model.graph[0])
    return PassResult((Rewrite("disconnect", ""),))


def _fail(rewrite: Pass, folder: Path, hook: KeepReproducer) -> InternalError:
    with pytest.raises(InternalError) as caught:
        PassManager(PassContext(WeightStore(folder)), [hook]).run(_model(), [rewrite])
    return caught.value


def _described(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"qcompiler-reproducer-{name}" / "reproduce.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_command_fails_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(EliminateDead, "run", _disconnect)
    plan = make_plan(CompileOptions(scheme="w4a16:b32", exclude=()))
    hook = KeepReproducer(
        tmp_path, ("--target", "onnxruntime", "--weight-range", "mse"), plan.recipe.to_toml()
    )
    error = _fail(pass_named("eliminate-dead", plan), tmp_path, hook)
    folder = tmp_path / "qcompiler-reproducer-eliminate-dead"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.onnx",
        "recipe.toml",
        "reproduce.json",
    ]
    command = _described(tmp_path, "eliminate-dead")["command"]
    assert command == (
        "qcompile run-pass eliminate-dead model.onnx -o after.onnx --recipe recipe.toml "
        "--target onnxruntime --weight-range mse"
    )
    assert f"in {folder}, `{command}` repeats it" in str(error)
    monkeypatch.chdir(folder)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(command)[1:])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == InternalError.exit_code
    assert f"{error.where}: {error.message}" in capsys.readouterr().err
    assert not (folder / "after.onnx").exists()


def test_without_a_recipe_the_command_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EliminateDead, "run", _disconnect)
    _fail(EliminateDead(), tmp_path, KeepReproducer(tmp_path, ("--target", "a b")))
    command = _described(tmp_path, "eliminate-dead")["command"]
    assert command.endswith("-o after.onnx --target 'a b'")
    folder = tmp_path / "qcompiler-reproducer-eliminate-dead"
    assert not (folder / "recipe.toml").exists()
    assert op_types(ir.load(folder / "model.onnx")) == ["Relu", "MatMul"]


def test_options_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FoldConstants, "run", _disconnect)
    _fail(FoldConstants(FoldConstantsOptions(7)), tmp_path, KeepReproducer(tmp_path))
    assert _described(tmp_path, "fold-constants")["options"] == {"growth_bytes": 7}


@dataclass(frozen=True, slots=True)
class _Table:
    name: str


@dataclass(frozen=True, slots=True)
class _Options:
    table: _Table
    stage: Stage
    pair: tuple[int, int]
    nothing: None = None


class Crash(Pass):
    """Fails with an exception that no one expects."""

    name = "crash"
    consumes = Stage.IMPORTED
    produces = Stage.IMPORTED
    numerics = Numerics.EXACT

    def __init__(self, options: object) -> None:
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        raise KeyError(FLOAT)


def test_options_of_any_type_are_json(tmp_path: Path) -> None:
    options = _Options(_Table("a-table"), Stage.QDQ, (1, 2))
    _fail(Crash(options), tmp_path, KeepReproducer(tmp_path))
    described = _described(tmp_path, "crash")
    assert described["options"] == {
        "table": "a-table",
        "stage": "qdq",
        "pair": "(1, 2)",
        "nothing": None,
    }
    assert described["error"] == "KeyError: 'float'"


def test_a_reproducer_that_cannot_be_written_does_not_hide_the_defect(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = _fail(Crash(None), tmp_path, KeepReproducer(tmp_path / "file"))
    assert "failed with KeyError" in error.message
    assert "no reproducer was written" in str(error.hint)
