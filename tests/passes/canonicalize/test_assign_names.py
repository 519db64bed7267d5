"""assign-names: every node and value has a name of its own."""

from pathlib import Path

import numpy as np

from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.editing import value_names
from qcompiler.ir.provenance import ORIGIN
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.canonicalize.assign_names import AssignNames
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager, stage_of
from qcompiler.rewriting.stages import Stage
from tests.support.graphs import body_of, build, node_named, random_array
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, run_pass

# Both bodies call their values "t" and "a", and their weights "w", as exporters do.
_TEXT = """
g (float[2] x, bool p) => (float[2] y) {
  [fc] h = Relu (x)
  [fc] k = Neg (h)
  z = If (p) <
    then_branch = then_g () => (a) { t = Mul (k, w) [fc] a = Add (t, k) },
    else_branch = else_g () => (a) { t = Sub (k, w) [kept] a = Add (t, h) }
  >
  [fc_2] y = Abs (z)
}
"""
_WEIGHTS = {"then_g/w": random_array(2), "else_g/w": random_array(2, seed=1)}


def test_the_first_of_a_name_keeps_it_and_the_others_get_numbers(tmp_path: Path) -> None:
    model = build(_TEXT, _WEIGHTS)
    run_pass(AssignNames(), model, tmp_path)
    assert [node.name for node in all_nodes(model)] == [
        *("fc", "fc_3", "If_z", "Mul_t", "fc_4", "Sub_t_2", "kept", "fc_2")
    ]
    assert node_named(model, "fc_3").metadata_props[ORIGIN] == '["fc"]'
    for name in ("fc", "If_z", "kept", "fc_2"):
        assert ORIGIN not in node_named(model, name).metadata_props


def test_values_are_unique_across_bodies(tmp_path: Path) -> None:
    model = build(_TEXT, _WEIGHTS)
    run_pass(AssignNames(), model, tmp_path)
    assert value_names(model) == {
        *("x", "p", "h", "k", "z", "y", "a", "t", "w"),
        *("a_2", "t_2", "w_2"),
    }
    assert list(body_of(model, "else_g").initializers) == ["w_2"]


def test_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    text = """g (float[2] x, bool p) => (float[2] y) {
      z = If (p) <
        then_branch = then_g () => (y) { y = Relu (x) },
        else_branch = else_g () => (b) { b = Neg (x) }
      >
      y = Abs (z)
    }"""
    model = build(text)
    run_pass(AssignNames(), model, tmp_path)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert [value.name for value in body_of(model, "then_g").outputs] == ["y_2"]


def test_outputs_left_out_stay_without_a_name(tmp_path: Path) -> None:
    text = "g (float[2,3] x) => (float[2,1] y) { v, y = TopK (x, k) }"
    model = build(text, {"k": np.array([1])})
    model.graph[0].outputs[0].name = ""
    run_pass(AssignNames(), model, tmp_path)
    assert node_named(model, "TopK_y").outputs[0].name == ""


def test_a_used_value_without_a_name_gets_one(tmp_path: Path) -> None:
    model = build("g (float[2] x) => (float[2] y) { [act] h = Relu (x) y = Neg (h) }")
    model.graph[0].outputs[0].name = None
    run_pass(AssignNames(), model, tmp_path)
    assert model.graph[0].outputs[0].name == "act_output_0"


def test_runs_on_a_model_out_of_order(tmp_path: Path) -> None:
    text = "g (float[1] x) => (float[1] y) { c = Constant<value_float = 2.0>() y = Mul(x, c) }"
    model = build(text)
    PassManager(PassContext(WeightStore(tmp_path))).run(model, [AssignNames()])
    assert stage_of(model) is Stage.IMPORTED


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(AssignNames(), build(_TEXT, _WEIGHTS), tmp_path)


def test_keeps_numerics(tmp_path: Path) -> None:
    model = build(_TEXT, _WEIGHTS)
    run_pass(AssignNames(), model, tmp_path)
    for branch in (True, False):
        feeds = {"x": random_array(2, seed=2), "p": np.array(branch)}
        # ONNX Runtime does not load a model in which two nodes share a name.
        nameless = build(_TEXT.replace("[fc]", ""), _WEIGHTS)
        assert_parity(nameless, model, tolerance=0, feeds=feeds)
