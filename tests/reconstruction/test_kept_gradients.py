"""Gradients are kept by all that decides them, and what is kept is what they were."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler.errors import InternalError
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.assign.assign_islands import AssignIslands
from qcompiler.reconstruction import island_scores
from qcompiler.rewriting.base import PassContext
from tests.support.graphs import serialized
from tests.support.islands import Setting, planned


def _assigned(setting: Setting, folder: Path, gradients: Path | None) -> ir.Model:
    model = planned(setting.seed, setting.scheme)
    options = replace(setting.islands().options, gradients=gradients)
    AssignIslands(options).run(model, PassContext(WeightStore(folder)))
    return model


@pytest.mark.parametrize("outputs", [False, True])
def test_kept_gradients_choose_the_same(
    outputs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(outputs=outputs).fraction(0.02)
    kept = tmp_path / "kept"
    kept.mkdir()
    plain = _assigned(setting, tmp_path, None)
    first = _assigned(setting, tmp_path, kept)

    def computed(*_arguments: object) -> float:
        message = "computed again"
        raise InternalError(message)

    monkeypatch.setattr(island_scores, "sum_gradients", computed)
    again = _assigned(setting, tmp_path, kept)
    assert serialized(again) == serialized(first) == serialized(plain)
    # Of the float model they are the same at another scheme; at codes they are not.
    other = replace(setting, scheme="w4a16:b16:asym")
    if outputs:
        with pytest.raises(InternalError):
            _assigned(other, tmp_path, kept)
    else:
        _assigned(other, tmp_path, kept)
    for changed in (replace(setting, seed=1), replace(setting, task=1)):
        with pytest.raises(InternalError):
            _assigned(changed, tmp_path, kept)


def test_what_was_stopped_is_not_read(tmp_path: Path) -> None:
    setting = Setting().fraction(0.02)
    kept = tmp_path / "kept"
    kept.mkdir()
    _assigned(setting, tmp_path, kept)
    (folder,) = kept.iterdir()
    (folder / "index.json").unlink()
    _assigned(setting, tmp_path, kept)
    assert (folder / "index.json").exists()
