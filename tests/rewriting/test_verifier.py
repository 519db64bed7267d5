"""What the verifier finds, and how it says it."""

import onnx_ir as ir
import pytest

from qcompiler.errors import InternalError
from qcompiler.rewriting.stages import Stage
from qcompiler.rewriting.verifier import Signature, check_standard, verify
from tests.support.graphs import build, node_named

_TEXT = "g (float[2, 4] x) => (float[2, 4] y) { [a] h = Relu(x) [b] y = Neg(h) }"


def _verify(model: ir.Model, signature: Signature | None = None) -> None:
    verify(model, Stage.IMPORTED, signature or Signature.of(model), after="pass p")


def test_a_sound_model_passes() -> None:
    model = build(_TEXT)
    _verify(model)
    check_standard(model, after="pass p")


def test_a_broken_use_names_node_and_pass() -> None:
    model = build(_TEXT)
    model.graph.remove(node_named(model, "a"))
    with pytest.raises(InternalError, match=r"\[use-def\] b \(Neg\): input 0 \(h\)") as caught:
        _verify(model)
    assert caught.value.where == "pass p"


def test_at_most_five_faults_are_listed() -> None:
    nodes = " ".join(f"[n{i}] y{i} = Neg(h)" for i in range(7))
    outputs = ", ".join(f"float[2] y{i}" for i in range(7))
    model = build(f"g (float[2] x) => ({outputs}) {{ [a] h = Relu(x) {nodes} }}")
    model.graph.remove(node_named(model, "a"))
    with pytest.raises(InternalError) as caught:
        _verify(model)
    assert caught.value.message.count("[use-def]") == 5
    assert caught.value.message.endswith("; and more")


@pytest.mark.parametrize(
    "changed",
    [
        _TEXT.replace("(float[2, 4] x)", "(float[3, 4] x)"),
        _TEXT.replace("float[2, 4]", "double[2, 4]"),
        _TEXT.replace("x)", "renamed)"),
        _TEXT.replace("y", "renamed"),
    ],
)
def test_names_types_and_input_shapes_must_stay(changed: str) -> None:
    signature = Signature.of(build(_TEXT))
    with pytest.raises(InternalError, match="changed the model's signature"):
        _verify(build(changed), signature)


def test_output_shapes_may_be_sharpened() -> None:
    signature = Signature.of(build(_TEXT.replace("(float[2, 4] y)", "(float[n, m] y)")))
    _verify(build(_TEXT), signature)


def test_the_standard_checker_is_asked() -> None:
    model = build(_TEXT)
    node_named(model, "a").attributes["surprise"] = ir.AttrInt64("surprise", 1)
    _verify(model)
    with pytest.raises(InternalError, match=r"checker refuses the model: .*surprise") as caught:
        check_standard(model, after="pass p")
    assert caught.value.where == "pass p"
