"""lift-constants: Constant nodes become initializers."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.errors import ModelError
from qcompiler.passes.canonicalize.lift_constants import LiftConstants
from tests.support.graphs import body_of, build, initializer, op_types
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

_ALL_FORMS = """
g (float[2] x) => (float[2] y, int64[2] z, float k) {
  a = Constant <value = float[2] {1.0, 2.0}> ()
  b = Constant <value_float = 0.5> ()
  c = Constant <value_floats = [3.0, 4.0]> ()
  d = Constant <value_int = 7> ()
  e = Constant <value_ints = [8, 9]> ()
  k = Constant <value_float = 2.5> ()
  t = Add (x, a)
  u = Mul (t, b)
  y = Add (u, c)
  z = Add (d, e)
}
"""
_IN_BODY = """
g (float[2] x, bool p) => (float[2] y) {
  y = If (p) <
    then_branch = then_g () => (float[2] a) { a = Constant <value_floats = [1.0, 2.0]> () },
    else_branch = else_g () => (float[2] b) {
      c = Constant <value_floats = [3.0, 4.0]> ()
      b = Add (x, c)
    }
  >
}
"""


def test_every_form_of_value_is_lifted(tmp_path: Path) -> None:
    model = build(_ALL_FORMS)
    result = run_pass(LiftConstants(), model, tmp_path)
    assert op_types(model) == ["Add", "Mul", "Add", "Add"]
    assert [rewrite.node for rewrite in result.rewrites] == [
        *("Constant_a", "Constant_b", "Constant_c", "Constant_d", "Constant_e", "Constant_k")
    ]
    assert initializer(model, "d").dtype == np.int64
    assert initializer(model, "d").shape == ()
    assert initializer(model, "b").dtype == np.float32
    assert [value.name for value in model.graph.outputs] == ["y", "z", "k"]


def test_bodies_keep_their_constants_also_as_outputs(tmp_path: Path) -> None:
    model, before = build(_IN_BODY), build(_IN_BODY)
    run_pass(LiftConstants(), model, tmp_path)
    assert op_types(model) == ["If", "Add"]
    assert list(body_of(model, "then_g").initializers) == ["a"]
    for branch in (True, False):
        feeds = {"x": np.ones(2, np.float32), "p": np.array(branch)}
        assert_parity(before, model, tolerance=0, feeds=feeds)


def test_texts_become_text_initializers(tmp_path: Path) -> None:
    model = build('g () => (string[2] y) { y = Constant <value_strings = ["a", "b"]> () }')
    run_pass(LiftConstants(), model, tmp_path)
    tensor = model.graph.initializers["y"].const_value
    assert isinstance(tensor, ir.StringTensor)
    assert list(tensor.string_data()) == [b"a", b"b"]
    onnx.checker.check_model(ir.to_proto(model))


def test_sparse_values_are_refused(tmp_path: Path) -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    sparse = ir.Attr("sparse_value", ir.AttributeType.SPARSE_TENSOR, None)
    model.graph.insert_before(model.graph[0], ir.Node("", "Constant", [], [sparse], name="s"))
    skip = only_skip(run_pass(LiftConstants(), model, tmp_path))
    assert skip.node == "s"
    assert skip.reason == "its value is a sparse tensor, and initializers are kept dense"


def test_a_constant_without_value_is_an_error(tmp_path: Path) -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    model.graph.insert_before(model.graph[0], ir.Node("", "Constant", [], name="empty"))
    with pytest.raises(ModelError, match="holds exactly one value"):
        run_pass(LiftConstants(), model, tmp_path)


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(LiftConstants(), build(_ALL_FORMS), tmp_path)
    assert_idempotent(LiftConstants(), build(_IN_BODY), tmp_path)


def test_keeps_numerics(tmp_path: Path) -> None:
    model, before = build(_ALL_FORMS), build(_ALL_FORMS)
    run_pass(LiftConstants(), model, tmp_path)
    assert_parity(before, model, tolerance=0)
