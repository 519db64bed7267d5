"""eliminate-dead: what no output depends on goes."""

from pathlib import Path

import numpy as np

from qcompiler.passes.canonicalize.eliminate_dead import EliminateDead
from tests.support.graphs import body_of, build, op_types, random_array
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, run_pass

_TEXT = """<ir_version: 10, opset_import: ["" : 21, "my" : 1, "other" : 1]>
g (float[2] x, bool p, float[2] unused) => (float[2] y) {
  only_for_the_dead_if = Exp (x)
  dead = If (p) <
    then_branch = dead_then () => (a) { a = Neg (only_for_the_dead_if) },
    else_branch = dead_else () => (b) { b = Abs (only_for_the_dead_if) }
  >
  h = Mul (x, w)
  y = If (p) <
    then_branch = then_g () => (c) { e = Add (h, v) c = Neg (h) },
    else_branch = else_g () => (d) { d = Add (h, u) }
  >
}
<domain: "my", opset_import: ["" : 21]>
f (u) => (v) { v = Relu (u) }
"""
_WEIGHTS = {
    "w": random_array(2),
    "dead_weight": random_array(2),
    "then_g/v": random_array(2),
    "else_g/u": random_array(2, seed=4),
}


def test_dead_parts_go_in_one_run(tmp_path: Path) -> None:
    model = build(_TEXT, _WEIGHTS)
    result = run_pass(EliminateDead(), model, tmp_path)
    assert op_types(model) == ["Mul", "If", "Neg", "Add"]
    assert list(model.graph.initializers) == ["w"]
    assert not body_of(model, "then_g").initializers
    assert list(body_of(model, "else_g").initializers) == ["u"]
    assert not model.functions
    assert list(model.opset_imports) == [""]
    assert [rewrite.detail for rewrite in result.rewrites] == [
        *("Add", "If", "Exp", "initializer", "initializer"),
        *("function", "opset import", "opset import"),
    ]


def test_inputs_and_their_defaults_stay(tmp_path: Path) -> None:
    text = "g (float[2] x, float[2] d) => (float[2] y) { y = Relu (x) }"
    model = build(text, {"d": np.ones(2, np.float32)})
    assert not run_pass(EliminateDead(), model, tmp_path).rewrites
    assert [value.name for value in model.graph.inputs] == ["x", "d"]
    assert list(model.graph.initializers) == ["d"]


def test_a_node_with_one_used_output_stays(tmp_path: Path) -> None:
    model = build("g (float[4] x) => (b) { a, b = Split <num_outputs = 2> (x) c = Neg (a) }")
    run_pass(EliminateDead(), model, tmp_path)
    assert op_types(model) == ["Split"]


def test_a_weight_that_is_an_output_stays(tmp_path: Path) -> None:
    model = build("g (float[2] x) => (y, float[2] w) { y = Relu (x) }", {"w": random_array(2)})
    assert not run_pass(EliminateDead(), model, tmp_path).rewrites


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(EliminateDead(), build(_TEXT, _WEIGHTS), tmp_path)


def test_keeps_numerics(tmp_path: Path) -> None:
    model = build(_TEXT, _WEIGHTS)
    run_pass(EliminateDead(), model, tmp_path)
    for branch in (True, False):
        x = random_array(2, seed=9)
        feeds = {"x": x, "p": np.array(branch), "unused": x}
        assert_parity(build(_TEXT, _WEIGHTS), model, tolerance=0, feeds=feeds)
