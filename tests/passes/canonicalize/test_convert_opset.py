"""convert-opset: the pass around `qcompiler.ir.opset`, whose own tests cover the operators."""

from pathlib import Path

import pytest

from qcompiler.errors import ModelError
from qcompiler.passes.canonicalize.convert_opset import ConvertOpset, ConvertOpsetOptions
from tests.support.graphs import build
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, run_pass

_OLD = (
    "g (float[1,2] x) => (float[2] y) { s = Squeeze <axes = [0]> (x) y = Softmax <axis = 0> (s) }"
)
_TO_21 = ConvertOpset(ConvertOpsetOptions(version=21))


def test_raises_the_opset_and_says_so(tmp_path: Path) -> None:
    model = build(_OLD, opset=11)
    result = run_pass(_TO_21, model, tmp_path)
    assert model.opset_imports[""] == 21
    assert [rewrite.detail for rewrite in result.rewrites] == ["from opset 11 to 21"]


def test_leaves_a_newer_model_alone(tmp_path: Path) -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }", opset=22)
    assert not run_pass(_TO_21, model, tmp_path).rewrites
    assert model.opset_imports[""] == 22


def test_a_node_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    norm = "[odd] y = BatchNormalization <spatial = 0> (x, s, s, s, s)"
    model = build(f"g (float[1,2,3] x, float[2,3] s) => (y) {{ {norm} }}", opset=7)
    with pytest.raises(ModelError, match="odd"):
        run_pass(_TO_21, model, tmp_path)


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(_TO_21, build(_OLD, opset=11), tmp_path)


def test_keeps_numerics(tmp_path: Path) -> None:
    model = build(_OLD, opset=11)
    run_pass(_TO_21, model, tmp_path)
    assert_parity(build(_OLD, opset=11), model, tolerance=0)
