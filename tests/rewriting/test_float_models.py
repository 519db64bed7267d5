"""Which models are kept: before equalization, and before anything is lost."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from qcompiler.ir.weights import WeightStore
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult
from qcompiler.rewriting.float_models import KeepFloatModels
from qcompiler.rewriting.manager import PassManager
from qcompiler.rewriting.stages import Stage
from tests.support.graphs import build


class _Rename(Pass):
    """Names the graph after itself."""

    consumes: ClassVar[Stage] = Stage.IMPORTED
    produces: ClassVar[Stage] = Stage.IMPORTED

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        model.graph.name = self.name
        return PassResult()


class _Exact(_Rename):
    name: ClassVar[str] = "exact"
    numerics: ClassVar[Numerics] = Numerics.EXACT


class _Equalize(_Rename):
    name: ClassVar[str] = "equalize"
    numerics: ClassVar[Numerics] = Numerics.EXACT


class _Lossy(_Rename):
    name: ClassVar[str] = "lossy"
    numerics: ClassVar[Numerics] = Numerics.LOSSY


class _Users(_Lossy):
    name: ClassVar[str] = "users"
    written_by_user: ClassVar[bool] = True


def kept(
    passes: Sequence[Pass], folder: Path, missed: Sequence[Pass] = ()
) -> tuple[str | None, str | None]:
    hook = KeepFloatModels("equalize")
    hook.missed(missed)
    with WeightStore(folder) as store:
        model = build("start (float[2] x) => (float[2] y) { y = Relu(x) }")
        PassManager(PassContext(store), [hook]).run(model, passes)
    names = [None if m is None else m.graph.name for m in (hook.first, hook.last)]
    return names[0], names[1]


def test_the_models_before_equalization_and_before_loss_are_kept(tmp_path: Path) -> None:
    passes = [_Users(), _Exact(), _Equalize(), _Exact(), _Lossy(), _Equalize(), _Lossy()]
    assert kept(passes, tmp_path) == ("exact", "exact")
    assert kept([_Equalize(), _Lossy()], tmp_path) == ("start", "equalize")


def test_models_from_before_what_was_missed_are_not_kept(tmp_path: Path) -> None:
    assert kept([_Lossy()], tmp_path, [_Exact()]) == ("start", "start")
    assert kept([_Lossy()], tmp_path, [_Equalize()]) == (None, "start")
    assert kept([_Lossy()], tmp_path, [_Users(), _Equalize(), _Lossy()]) == (None, None)


def test_without_equalization_both_are_the_same(tmp_path: Path) -> None:
    assert kept([_Exact(), _Lossy()], tmp_path) == ("exact", "exact")
    assert kept([_Exact(), _Users()], tmp_path) == (None, None)
