"""inline-functions: calls become what the functions hold."""

from pathlib import Path

import pytest

from qcompiler.errors import ModelError
from qcompiler.ir.dataflow import all_nodes
from qcompiler.passes.canonicalize.inline_functions import InlineFunctions
from tests.support.graphs import build, node_named, op_types
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, run_pass

_HEADER = '<ir_version: 10, opset_import: ["" : 21, "my" : 1]>\n'
_NESTED = (
    _HEADER
    + """
g (float[2] x, bool p) => (float[2] y, float[2] z) {
  [first] y = my.f (x)
  [second] t = my.f (y)
  [branch] z = If (p) <
    then_branch = then_g () => (float[2] a) { [inside] a = my.f (t) },
    else_branch = else_g () => (float[2] b) { h = Neg (t)
      b = Add (h, t) }
  >
}
<domain: "my", opset_import: ["" : 21, "my" : 1]>
f (u) => (v) {
  [act] h = Relu (u)
  [outer] v = my.twice (h)
}
<domain: "my", opset_import: ["" : 21]>
twice (u) => (v) { [sum] v = Add (u, u) }
"""
)


_TWO_OUTPUTS = (
    '<domain: "my", opset_import: ["" : 21]> f (u) => (v, w) { v = Relu (u) w = Neg (u) }'
)
_HANDS_THROUGH = '<domain: "my", opset_import: ["" : 21]> f (u) => (v, u) { v = Relu (u) }'


def test_nested_calls_and_calls_in_bodies_are_inlined(tmp_path: Path) -> None:
    model = build(_NESTED)
    node_named(model, "first").metadata_props["pkg.scope"] = "encoder.layer"
    result = run_pass(InlineFunctions(), model, tmp_path)
    assert op_types(model) == ["Relu", "Add", "Relu", "Add", "If", "Relu", "Add", "Neg", "Add"]
    assert [rewrite.node for rewrite in result.rewrites] == ["first", "second", "inside"]
    assert not model.functions
    assert node_named(model, "first/act").metadata_props["pkg.scope"] == "encoder.layer"


def test_names_say_where_nodes_came_from_and_are_unique(tmp_path: Path) -> None:
    model = build(_NESTED)
    run_pass(InlineFunctions(), model, tmp_path)
    names = [node.name for node in all_nodes(model) if node.name]
    assert names == [
        *("first/act", "first/sum", "second/act", "second/sum", "branch"),
        *("inside/act", "inside/sum"),
    ]
    assert all("inlined" not in key for node in all_nodes(model) for key in node.metadata_props)


def test_an_input_that_a_function_hands_through_keeps_its_name(tmp_path: Path) -> None:
    model = build(
        _HEADER + "g (float[2] x) => (float[2] y) { [call] v, y = my.f (x) }" + _HANDS_THROUGH
    )
    run_pass(InlineFunctions(), model, tmp_path)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    # ONNX Runtime does not load the model as it was; this is what it means.
    meant = build("g (float[2] x) => (float[2] y) { y = Identity (x) }")
    assert_parity(meant, model, tolerance=0)


def test_outputs_a_call_leaves_out(tmp_path: Path) -> None:
    model = build(_HEADER + "g (float[2] x) => (float[2] y) { y = my.f (x) }" + _TWO_OUTPUTS)
    run_pass(InlineFunctions(), model, tmp_path)
    assert op_types(model) == ["Relu", "Neg"]
    # Nor does ONNX Runtime load this one.
    meant = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    assert_parity(meant, model, tolerance=0)


def test_functions_nobody_calls_go(tmp_path: Path) -> None:
    text = _HEADER + "g (float[2] x) => (float[2] y) { y = Neg (x) }"
    model = build(text + '<domain: "my", opset_import: ["" : 21]> f (u) => (v) { v = Relu (u) }')
    assert run_pass(InlineFunctions(), model, tmp_path).rewrites[0].detail
    assert not model.functions


def test_a_function_of_another_opset_is_taken_where_its_ops_mean_the_same(tmp_path: Path) -> None:
    text = _HEADER + "g (float[2] x) => (float[2] y) { y = my.f (x) }"
    model = build(text + '<domain: "my", opset_import: ["" : 17]> f (u) => (v) { v = Relu (u) }')
    run_pass(InlineFunctions(), model, tmp_path)
    assert op_types(model) == ["Relu"]
    assert model.opset_imports[""] == 21


def test_a_function_of_another_opset_is_refused_where_they_do_not(tmp_path: Path) -> None:
    text = _HEADER + "g (float[2] x) => (y) { y = my.f (x) }"
    model = build(
        text
        + '<domain: "my", opset_import: ["" : 11]> f (u) => (v) { v = Squeeze <axes = [0]> (u) }'
    )
    with pytest.raises(ModelError, match="Squeeze of opset 11, and the model imports opset 21"):
        run_pass(InlineFunctions(), model, tmp_path)


def test_functions_in_a_circle_are_refused(tmp_path: Path) -> None:
    text = _HEADER + "g (float[2] x) => (float[2] y) { y = my.f (x) }"
    model = build(
        text + '<domain: "my", opset_import: ["" : 21, "my" : 1]> f (u) => (v) { v = my.f (u) }'
    )
    with pytest.raises(ModelError, match="cannot be inlined: Cyclic"):
        run_pass(InlineFunctions(), model, tmp_path)


def test_a_name_made_inside_a_function_does_not_hide_one_of_a_body(tmp_path: Path) -> None:
    # Inlining makes an outer "h"; the else branch has an "h" of its own and reads the outer sum.
    model = build(_NESTED)
    run_pass(InlineFunctions(), model, tmp_path)
    names = [value.name for node in all_nodes(model) for value in node.outputs]
    assert len(names) == len(set(names))


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(InlineFunctions(), build(_NESTED), tmp_path)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_keeps_numerics(tmp_path: Path, seed: int) -> None:
    model = build(_NESTED)
    run_pass(InlineFunctions(), model, tmp_path)
    assert_parity(build(_NESTED), model, tolerance=0, seed=seed)
