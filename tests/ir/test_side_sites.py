"""Tables of positions: blocks are cut although every layer reads them."""

import pytest

from qcompiler.ir.blocks import find_blocks, find_layers
from qcompiler.ir.side_sites import side_sites
from tests.support.graphs import build, random_array

_LAYERS = """
        q0 = MatMul(h0, w0) r0 = Mul(q0, table) o0 = MatMul(r0, w1) h1 = Add(h0, o0)
        q1 = MatMul(h1, w2) r1 = Mul(q1, table) o1 = MatMul(r1, w3) h2 = Add(h1, o1)
        y = MatMul(h2, w4)
"""
_TABLES = {
    "angles times positions": (
        "int64[1, T] at",
        "place = Cast<to=1>(at) turns = MatMul(angle, place) "
        "waves = Transpose<perm=[1, 0]>(turns) table = Cos(waves)",
    ),
    "a cache of cosines": ("int64[T] at", "table = Gather(cosines, at)"),
    "of distances, from shapes alone": (
        "int64[N] unused",
        "dims = Shape(ids) length = Squeeze(dims) places = Range(zero, length, one) "
        "table = Gather(cosines, places)",
    ),
}


def _weights(width: int = 4) -> dict[str, object]:
    weights: dict[str, object] = {f"w{i}": random_array(width, width, seed=i) for i in range(5)}
    weights |= {"words": random_array(50, width, seed=7), "angle": random_array(width, 1, seed=8)}
    return weights | {"cosines": random_array(16, width, seed=9)}


@pytest.mark.parametrize(("given", "made"), _TABLES.values(), ids=_TABLES)
def test_a_table_that_all_layers_read_leaves_the_cuts(given: str, made: str) -> None:
    text = f"""g (int64[T] ids, {given}) => (float[T, 4] y)
        <int64 zero = {{0}}, int64 one = {{1}}> {{ h0 = Gather(words, ids) {made} {_LAYERS} }}"""
    model = build(text, _weights())
    assert [block.output for block in find_blocks(model)] == ["h0", "h1", "h2", None]
    inside = [node.outputs[0].name for block in find_blocks(model) for node in block.nodes]
    assert len(inside) == len(set(inside))
    assert {"turns"} & set(inside) or "table" in inside


def test_what_a_product_alone_depends_on_is_data() -> None:
    text = f"""g (int64[T] ids) => (float[T, 4] y) {{
        h0 = Gather(words, ids) table = Gather(cosines, ids) {_LAYERS} }}"""
    outputs = [block.output for block in find_blocks(build(text, _weights()))]
    assert "h0" in outputs
    assert "table" not in outputs


def test_a_lookup_that_is_read_once_stays_where_it_is() -> None:
    """An embedding of positions is added to that of words, before everything else."""
    text = """g (int64[T] ids, int64[T] at) => (float[T, 4] y) {
        word = Gather(words, ids) place = Gather(cosines, at) h0 = Add(word, place)
        o0 = MatMul(h0, w0) h1 = Add(h0, o0) y = MatMul(h1, w1) }"""
    blocks = find_blocks(build(text, _weights()))
    assert [block.output for block in blocks] == ["word", "h0", "h1", None]
    assert [len(block.nodes) for block in blocks] == [1, 2, 2, 1]


def test_of_tables_that_all_need_the_largest_is_data() -> None:
    lookups = "table = Gather(cosines, at) word = Gather(words, ids) h0 = Add(word, table)"
    text = f"""g (int64[T] ids, int64[T] at) => (float[T, 4] y) {{ {lookups} {_LAYERS} }}"""
    model = build(text, _weights())
    gathers = {node.outputs[0].name: node for node in model.graph if node.op_type == "Gather"}
    sizes = {node: 16 for node in model.graph if node.op_type == "MatMul"}
    sizes |= {gathers["table"]: 64, gathers["word"]: 200}
    assert side_sites(model.graph, sizes) == {gathers["table"]}
    again = "skip = Mul(word, word) y = Add(y_0, skip)"
    both = build(text.replace("y = MatMul(h2, w4)", f"y_0 = MatMul(h2, w4) {again}"), _weights())
    gathers = {node.outputs[0].name: node for node in both.graph if node.op_type == "Gather"}
    sizes = {node: 16 for node in both.graph if node.op_type == "MatMul"}
    sizes |= {gathers["table"]: 64, gathers["word"]: 200}
    assert side_sites(both.graph, sizes) == {gathers["table"]}


def test_products_of_float_inputs_are_data() -> None:
    text = """g (float[T, 4] x) => (float[T, 4] y) {
        q = MatMul(x, w0) k = MatMul(x, w1) s = Mul(q, k) y = MatMul(s, w2) }"""
    model = build(text, {f"w{i}": random_array(4, 4, seed=i) for i in range(3)})
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert side_sites(model.graph, dict.fromkeys(products, 16)) == set()


def test_a_table_has_no_part_in_what_repeats() -> None:
    given, made = _TABLES["angles times positions"]
    text = f"""g (int64[T] ids, {given}) => (float[T, 4] y) {{
        h0 = Gather(words, ids) {made} {_LAYERS} }}"""
    layers = find_layers(build(text, _weights()))
    assert [layer.output for layer in layers] == ["h0", "h1", "h2", None]


def test_a_model_of_lookups_alone_keeps_its_only_one() -> None:
    model = build("g (int64[T] ids) => (float[T, 4] y) { y = Gather(words, ids) }", _weights())
    (block,) = find_blocks(model)
    assert [node.op_type for node in block.nodes] == ["Gather"]
