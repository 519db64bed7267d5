"""Questions about producers, consumers and captured values."""

import pytest

from qcompiler.ir.dataflow import (
    all_nodes,
    captured_values,
    constant_of,
    node_label,
    standard_domain,
    standard_opset,
)
from tests.support.graphs import build, node_named, random_array

_NESTED = """g (bool c, float[N] x, float[N] z) => (float[N] y) {
    [outer] y = If(c) <
        then_branch = t () => (float[N] a) {
            [inner] a = If(c) <
                then_branch = tt () => (float[N] p) { [deep] p = Add(x, w) },
                else_branch = te () => (float[N] q) { q = Relu(x) }
            >
        },
        else_branch = e () => (float[N] b) { b = Identity(z) }
    >
}"""


def test_bodies_are_walked_at_any_depth() -> None:
    model = build(_NESTED, {"w": random_array(1)})
    assert [n.op_type for n in all_nodes(model)] == ["If", "If", "Add", "Relu", "Identity"]


def test_captured_values_cross_every_level_once() -> None:
    model = build(_NESTED, {"w": random_array(1)})
    captured = [value.name for value in captured_values(node_named(model, "outer"))]
    assert sorted(str(name) for name in captured) == ["c", "w", "x", "z"]
    assert len(captured) == len(set(captured))


def test_constants_are_initializers_and_constant_nodes() -> None:
    model = build(
        """g (float[1] x) => (float[1] y) {
            c = Constant<value = float[1] {2.0}>()
            a = Add(x, c)
            y = Add(a, w)
        }""",
        {"w": random_array(1)},
    )
    add, last = list(model.graph)[1:]
    assert constant_of(add.inputs[0]) is None
    assert constant_of(add.inputs[1]) is not None
    assert constant_of(last.inputs[1]) is not None


def test_an_input_with_a_default_is_not_constant() -> None:
    model = build("g (float[1] x) => (float[1] y) { y = Add(x, w) }", {"w": random_array(1)})
    value = model.graph.initializers["w"]
    model.graph.inputs.append(value)
    assert constant_of(value) is None


def test_a_node_without_a_name_is_called_by_what_it_computes() -> None:
    model = build("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    assert node_label(model.graph[0]) == "unnamed Relu that computes y"


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_the_standard_opset_has_two_names(domain: str) -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    model.opset_imports.clear()
    assert standard_opset(model) == 0
    model.opset_imports.update({"com.microsoft": 1, domain: 21})
    assert standard_opset(model) == standard_opset(model.graph) == 21
    assert standard_domain(domain) == ""
    assert standard_domain("com.microsoft") == "com.microsoft"
