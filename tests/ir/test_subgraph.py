"""Cutting a graph at named values."""

from collections.abc import Sequence

import onnx_ir as ir
import pytest

from qcompiler.errors import UsageError
from qcompiler.ir.subgraph import subgraph_between
from tests.support.graphs import build, random_array

_TEXT = """g (float[N, 4] x, float[N, 4] mask, float[N] unused) => (float[N, 4] y, float[N, 4] z) {
    [one] a = MatMul(x, w)
    [two] b = Add(a, mask)
    [three] y = Relu(b)
    [four] z = Neg(a)
}"""


def _names(items: Sequence[ir.Value] | Sequence[ir.Node]) -> list[str | None]:
    return [item.name for item in items]


def test_a_cut_keeps_what_lies_between() -> None:
    found = subgraph_between(build(_TEXT, {"w": random_array(4, 4)}), ["a"], ["y"])
    assert _names(found.nodes) == ["two", "three"]
    assert _names(found.outputs) == ["y"]


def test_graph_inputs_that_are_read_as_well_come_last() -> None:
    found = subgraph_between(build(_TEXT, {"w": random_array(4, 4)}), ["a"], ["y"])
    assert _names(found.inputs) == ["a", "mask"]


def test_without_names_it_is_the_whole_graph() -> None:
    found = subgraph_between(build(_TEXT, {"w": random_array(4, 4)}))
    assert _names(found.nodes) == ["one", "two", "three", "four"]
    assert _names(found.inputs) == ["x", "mask", "unused"]
    assert _names(found.outputs) == ["y", "z"]


def test_what_a_body_reads_is_computed_too() -> None:
    text = """g (bool c, float[N] x) => (float[N] y) {
        a = Neg(x)
        y = If(c) <
            then_branch = t () => (float[N] p) { p = Abs(a) },
            else_branch = e () => (float[N] q) { q = Relu(x) }
        >
    }"""
    found = subgraph_between(build(text), outputs=["y"])
    assert [node.op_type for node in found.nodes] == ["Neg", "If"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        (["nothing"], ["y"], "no value of the main graph has this name"),
        (["a"], ["nothing"], "no value of the main graph has this name"),
        (["w"], ["y"], "w is a constant"),
        (["b"], ["z"], "no output asked for depends on b"),
    ],
)
def test_refuses_names_that_make_no_sense(
    inputs: list[str], outputs: list[str], reason: str
) -> None:
    model = build(_TEXT, {"w": random_array(4, 4)})
    with pytest.raises(UsageError, match=reason):
        subgraph_between(model, inputs, outputs)
