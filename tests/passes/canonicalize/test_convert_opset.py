"""convert-opset: the pass around `qcompiler.ir.opset`, whose own tests cover the operators."""

from pathlib import Path

import pytest

from qcompiler.errors import ModelError, TargetError
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


@pytest.mark.parametrize(("opset", "version"), [(22, 21), (11, 22)])
def test_refuses_what_the_target_does_not_load(opset: int, version: int, tmp_path: Path) -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }", opset=opset)
    with pytest.raises(TargetError, match="loads models up to opset 21, not 22"):
        run_pass(ConvertOpset(ConvertOpsetOptions(version, highest=21)), model, tmp_path)
    assert model.opset_imports[""] == opset
    run_pass(ConvertOpset(ConvertOpsetOptions(version, highest=22)), model, tmp_path)


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(_TO_21, build(_OLD, opset=11), tmp_path)


def test_keeps_numerics(tmp_path: Path) -> None:
    model = build(_OLD, opset=11)
    run_pass(_TO_21, model, tmp_path)
    assert_parity(build(_OLD, opset=11), model, tolerance=0)


def test_the_other_name_of_the_standard_domain_is_read(tmp_path: Path) -> None:
    header = '<ir_version: 10, opset_import: ["ai.onnx" : 22]>'
    model = build(f"{header} g (float[2] x) => (float[2] y) {{ y = Relu (x) }}")
    assert run_pass(_TO_21, model, tmp_path).rewrites == ()
    assert model.opset_imports == {"ai.onnx": 22}
    with pytest.raises(TargetError, match="loads models up to opset 21, not 22"):
        run_pass(ConvertOpset(ConvertOpsetOptions(21, highest=21)), model, tmp_path)
    model.opset_imports["ai.onnx"] = 18
    (rewrite,) = run_pass(_TO_21, model, tmp_path).rewrites
    assert rewrite.detail == "from opset 18 to 21"
    assert model.opset_imports == {"": 21}
