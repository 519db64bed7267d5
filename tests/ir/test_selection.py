"""Which nodes a selector means."""

import pytest

from qcompiler.errors import UsageError
from qcompiler.ir.blocks import find_blocks
from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.editing import record_origin
from qcompiler.ir.selection import SelectionIndex
from qcompiler.quant.selector import Selector
from tests.support.graphs import build, node_named, random_array

_CHAIN = """g (float[N,4] x) => (float[N,4] y, float[N,4] z) {
    [first] a = MatMul(x, w1)
    [act] b = Relu(a)
    [second] c = MatMul(b, w2)
    [side] z = MatMul(a, w3)
    [third] y = MatMul(c, w4)
}"""
_WEIGHTS = {f"w{index}": random_array(4, 4, seed=index) for index in range(1, 5)}


def _chosen(selector: Selector, text: str = _CHAIN) -> list[str | None]:
    model = build(text, _WEIGHTS)
    index = SelectionIndex(model, find_blocks(model))
    return [node.name for node in all_nodes(model) if index.selects(selector, node)]


def test_by_name_and_op_type() -> None:
    assert _chosen(Selector(name="*ir*")) == ["first", "third"]
    assert _chosen(Selector(op_type="Relu")) == ["act"]
    assert _chosen(Selector(name="*ir*", op_type="Relu")) == []
    assert len(_chosen(Selector())) == 5


def test_a_node_is_found_by_what_it_stands_for() -> None:
    model = build(_CHAIN, _WEIGHTS)
    record_origin(node_named(model, "third"), "lost")
    index = SelectionIndex(model, [])
    found = [node.name for node in all_nodes(model) if index.selects(Selector(name="lo*"), node)]
    assert found == ["third"]


@pytest.mark.parametrize(
    ("ends", "nodes"),
    [
        (("x", "y"), ["first", "act", "second", "third"]),
        (("a", "c"), ["act", "second"]),
        (("x", "z"), ["first", "side"]),
        (("b", "z"), []),
        (("y", "x"), []),
    ],
)
def test_between_two_values(ends: tuple[str, str], nodes: list[str]) -> None:
    assert _chosen(Selector(between=ends)) == nodes


def test_between_counts_what_a_body_captures() -> None:
    text = """g (bool c, float[N,4] x) => (float[N,4] y) {
        [first] a = MatMul(x, w1)
        [branch] t = If(c) <
            then_branch = t () => (float[N,4] p) { p = Relu(a) },
            else_branch = e () => (float[N,4] q) { q = Neg(x) }
        >
        [last] y = MatMul(t, w2)
    }"""
    assert _chosen(Selector(between=("a", "y")), text) == ["branch", "last"]


def test_between_an_unknown_value_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no value 'yy'") as caught:
        _chosen(Selector(between=("x", "yy")))
    assert caught.value.hint is not None
    assert "y" in caught.value.hint


def test_by_block() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) {
        [first] a = MatMul(x, w1) [act] b = Relu(a) [second] y = MatMul(b, w2)
    }"""
    model = build(text, _WEIGHTS)
    blocks = find_blocks(model)
    assert len(blocks) == 2
    for block in blocks:
        expected = [node.name for node in block.nodes]
        assert _chosen(Selector(blocks=(block.index,)), text) == expected
    assert _chosen(Selector(blocks=(7,)), text) == []


def test_a_selector_that_means_nothing_names_the_nearest() -> None:
    model = build(_CHAIN, _WEIGHTS)
    index = SelectionIndex(model, [])
    assert [node.name for node in index.nodes(Selector(op_type="Relu"), "here")] == ["act"]
    with pytest.raises(UsageError, match="name=secnd means no node") as caught:
        index.nodes(Selector(name="secnd"), "here")
    assert caught.value.where == "here"
    assert "second" in str(caught.value.hint)
