"""Small changes to a graph: bodies, captures and names of graph outputs are respected."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.dataflow import all_graphs
from qcompiler.ir.editing import (
    add_initializer,
    bypass,
    fresh_name,
    make_value_names_unique,
    remove_node,
    values_of,
)
from tests.support.graphs import body_of, build, node_named, op_types, random_array
from tests.support.parity import run_model


def test_an_initializer_is_registered_with_type_and_shape() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    value = add_initializer(model.graph, "w", ir.tensor(np.zeros((2, 3), np.float16)))
    assert model.graph.initializers["w"] is value
    assert (value.dtype, list(value.shape or ())) == (ir.DataType.FLOAT16, [2, 3])
    with pytest.raises(ValueError, match="already registered"):
        add_initializer(model.graph, "w", ir.tensor([1.0]))


def test_bypass_hands_the_input_to_every_reader() -> None:
    text = """g (bool c, float[2] x) => (float[2] y, float[2] z) {
        [no] a = Identity(x)
        y = Relu(a)
        z = If(c) <
            then_branch = t () => (float[2] p) { p = Neg(a) },
            else_branch = e () => (float[2] q) { q = Abs(a) }
        >
    }"""
    model = build(text)
    assert bypass(node_named(model, "no")) is None
    assert op_types(model) == ["Relu", "If", "Neg", "Abs"]
    x = np.array([-1, 2], np.float32)
    found = run_model(model, {"c": np.array(True), "x": x})
    np.testing.assert_array_equal(found["y"], [0, 2])
    np.testing.assert_array_equal(found["z"], -x)


def test_bypass_lets_the_producer_take_over_an_output_name() -> None:
    model = build("g (float[N] x) => (float[N] y) { a = Relu(x) [no] y = Identity(a) }")
    assert bypass(node_named(model, "no")) is None
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert model.graph.outputs[0].producer() is model.graph[0]
    np.testing.assert_array_equal(
        run_model(model, {"x": np.array([-1, 2], np.float32)})["y"], [0, 2]
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "[no] y = Identity(x) z = Relu(x)",
            "it hands x, which no node of the same graph computes, to the graph output y",
        ),
        (
            "z = Relu(x) [no] y = Identity(z)",
            "z and y are both graph outputs, and both names must stay",
        ),
    ],
)
def test_bypass_refuses_what_would_change_an_interface(body: str, reason: str) -> None:
    model = build(f"g (float[N] x) => (float[N] y, float[N] z) {{ {body} }}")
    before = op_types(model)
    assert bypass(node_named(model, "no")) == reason
    assert op_types(model) == before


def test_bypass_refuses_to_make_a_captured_value_the_output_of_a_body() -> None:
    text = """g (bool c, float[2] x) => (float[2] y) {
        a = Relu(x)
        y = If(c) <
            then_branch = t () => (float[2] p) { [no] p = Identity(a) },
            else_branch = e () => (float[2] q) { q = Abs(a) }
        >
    }"""
    model = build(text)
    reason = bypass(node_named(model, "no"))
    assert reason == "it hands a, which no node of the same graph computes, to the graph output p"
    assert [node.op_type for node in body_of(model, "t")] == ["Identity"]


def test_a_removed_node_no_longer_reads_what_its_bodies_captured() -> None:
    text = """g (bool c, float[2] x) => (float[2] y) {
        a = Relu(x)
        [outer] dead = If(c) <
            then_branch = t () => (float[2] p) {
                p = If(c) <
                    then_branch = tt () => (float[2] pp) { pp = Neg(a) },
                    else_branch = te () => (float[2] pq) { pq = Abs(a) }
                >
            },
            else_branch = e () => (float[2] q) { q = Abs(a) }
        >
        y = Neg(x)
    }"""
    model = build(text)
    captured = model.graph[0].outputs[0]
    assert len(captured.uses()) == 3
    remove_node(node_named(model, "outer"))
    assert captured.uses() == ()
    assert op_types(model) == ["Relu", "Neg"]


def test_a_node_that_is_read_is_not_removed() -> None:
    model = build("g (float[2] x) => (float[2] y) { [used] a = Relu(x) y = Neg(a) }")
    with pytest.raises(ValueError, match="still being used"):
        remove_node(node_named(model, "used"))


def test_value_names_are_unique_across_bodies_and_outputs_keep_theirs() -> None:
    text = """g (bool c, float[2] x) => (float[2] y) {
        y = If(c) <
            then_branch = t () => (float[2] y) { w = Neg(x) y = Relu(w) },
            else_branch = e () => (float[2] v) { w = Abs(x) v = Relu(w) }
        >
    }"""
    model = build(text, {"e/u": random_array(2)})
    renamed = make_value_names_unique(model)
    assert [(former, value.name) for value, former in renamed] == [("y", "y_2"), ("w", "w_2")]
    names = [value.name for graph in all_graphs(model) for value in values_of(graph)]
    assert len(names) == len(set(names))
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert make_value_names_unique(model) == []


def test_a_fresh_name_is_taken_at_once() -> None:
    taken = {"a", "a_2"}
    assert [fresh_name("a", taken), fresh_name("b", taken), fresh_name("b", taken)] == [
        "a_3",
        "b",
        "b_2",
    ]
