"""verify-canonical: the end of canonicalization, or a word about what was left out."""

from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler.errors import UsageError
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.canonicalize.verify_canonical import VerifyCanonical
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager, stage_of
from qcompiler.rewriting.stages import Stage
from tests.support.graphs import build
from tests.support.rewrites import assert_idempotent

_GOOD = "g (float[1] x) => (float[1] y) { [a] h = Relu(x) [b] y = Neg(h) }"
_CONSTANT = "g (float[1] x) => (float[1] y) { [c] c = Constant<value_float = 2.0>() y = Mul(x, c) }"
_TWICE = "g (float[1] x) => (float[1] y) { [a] h = Relu(x) [a] y = Neg(h) }"


def verified(model: ir.Model, folder: Path) -> ir.Model:
    PassManager(PassContext(WeightStore(folder))).run(model, [VerifyCanonical()])
    return model


def test_a_canonical_model_reaches_the_stage(tmp_path: Path) -> None:
    assert stage_of(verified(build(_GOOD), tmp_path)) is Stage.CANONICAL


@pytest.mark.parametrize(
    ("text", "message"),
    [(_CONSTANT, r"c \(Constant\).*a Constant node"), (_TWICE, r"a \(Neg\).*shares its name")],
)
def test_refuses_a_model_out_of_order(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        verified(build(text), tmp_path)
    assert "run the canonicalizing passes first" in str(caught.value)


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(VerifyCanonical(), build(_GOOD), tmp_path)
