"""Blocks: cut values by structure."""

import onnx_ir as ir
import pytest

from qcompiler.ir.blocks import find_blocks, find_layers, place_in_layer
from tests.support.graphs import build, node_named, random_array

_RESIDUAL = """g (float[N, 4] x, float[N, 4] mask) => (float[N, 4] y) {
    [embed] h0 = MatMul(x, w0)
    [up0] u0 = MatMul(h0, w1)
    m0 = Add(u0, mask)
    [down0] d0 = MatMul(m0, w2)
    h1 = Add(h0, d0)
    [up1] u1 = MatMul(h1, w3)
    m1 = Add(u1, mask)
    [down1] d1 = MatMul(m1, w4)
    y = Add(h1, d1)
}"""


def _weights() -> dict[str, object]:
    return {f"w{i}": random_array(4, 4, seed=i) for i in range(5)}


def test_residual_blocks_are_cut_at_the_stream() -> None:
    blocks = find_blocks(build(_RESIDUAL, _weights()))
    assert [block.output for block in blocks] == ["h0", "h1", None]
    assert [block.input for block in blocks] == [None, "h0", "h1"]


def test_a_chain_is_cut_everywhere_and_small_blocks_are_joined() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        a = MatMul(x, w0)
        b = MatMul(a, w1)
        c = MatMul(b, w2)
        y = MatMul(c, w3)
    }"""
    model = build(text, {f"w{i}": random_array(4, 4, seed=i) for i in range(4)})
    assert [block.output for block in find_blocks(model)] == ["a", "b", "c", None]
    assert [block.output for block in find_blocks(model, minimum_sites=2)] == ["b", None]


def test_values_that_no_site_leads_to_may_cross_a_cut() -> None:
    blocks = find_blocks(build(_RESIDUAL, _weights()))
    crossing = {node.op_type for block in blocks for node in block.nodes}
    assert crossing == {"MatMul", "Add"}


def test_every_tainted_node_is_in_exactly_one_block() -> None:
    blocks = find_blocks(build(_RESIDUAL, _weights()))
    nodes = [node for block in blocks for node in block.nodes]
    assert len(nodes) == len(set(nodes)) == 9


def test_a_body_belongs_to_the_block_of_its_node() -> None:
    text = """g (bool c, float[N, 4] x) => (float[N, 4] y) {
        a = MatMul(x, w0)
        b = If(c) <
            then_branch = t () => (float[N, 4] p) { p = MatMul(a, w1) },
            else_branch = e () => (float[N, 4] q) { q = Relu(a) }
        >
        y = MatMul(b, w2)
    }"""
    model = build(text, {f"w{i}": random_array(4, 4, seed=i) for i in range(3)})
    assert [block.output for block in find_blocks(model)] == ["a", "b", None]


def test_labels_come_from_exporter_metadata() -> None:
    model = build(_RESIDUAL, _weights())
    for node in model.graph:
        block = "layers.0" if node.name in ("up0", "down0") else "layers.1"
        if node.name not in ("", "embed"):
            node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', '{block}', '{block}.linear']"
    assert [block.label for block in find_blocks(model)][1:] == [
        "layers.0.linear",
        "layers.1.linear",
    ]


def test_a_model_without_sites_has_no_blocks() -> None:
    assert find_blocks(build("g (float[N] x) => (float[N] y) { y = Relu(x) }")) == []


def _activated() -> ir.Model:
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        a = MatMul(x, w0)
        b = Relu(a)
        c = Tanh(b)
        y = MatMul(c, w1)
    }"""
    return build(text, {f"w{i}": random_array(4, 4, seed=i) for i in range(2)})


def test_what_follows_a_product_alone_goes_with_it() -> None:
    model = _activated()
    assert [block.output for block in find_blocks(model)] == ["c", None]


def test_what_the_exporter_calls_another_module_does_not() -> None:
    model = _activated()
    for node, module in zip(model.graph, ("layer", "layer", "norm", "head"), strict=True):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', '{module}']"
    assert [block.output for block in find_blocks(model)] == ["b", None]


def _stack(layers: int) -> tuple[str, dict[str, object]]:
    """Return layers of a narrow and a wide residual block, between an embedding and a head."""
    weights: dict[str, object] = {"embed": random_array(4, 6), "head": random_array(6, 3)}
    lines = ["h0 = MatMul(x, embed)"]
    for at in range(layers):
        weights[f"a{at}"] = random_array(6, 6)
        weights[f"u{at}"], weights[f"d{at}"] = random_array(6, 12), random_array(12, 6)
        lines += [
            f"p{at} = MatMul(h{at}, a{at})",
            f"q{at} = Add(h{at}, p{at})",
            f"r{at} = MatMul(q{at}, u{at})",
            f"s{at} = MatMul(r{at}, d{at})",
            f"h{at + 1} = Add(q{at}, s{at})",
        ]
    lines.append(f"y = MatMul(h{layers}, head)")
    return f"g (float[N, 4] x) => (float[N, 3] y) {{ {' '.join(lines)} }}", weights


def test_layers_are_what_repeats() -> None:
    model = build(*_stack(4))
    assert len(find_blocks(model)) == 10
    layers = find_layers(model)
    assert [layer.output for layer in layers] == ["h0", "h1", "h2", "h3", "h4", None]
    assert [len(layer.nodes) for layer in layers] == [1, 5, 5, 5, 5, 1]
    assert [layer.input for layer in layers] == [None, *(layer.output for layer in layers[:-1])]


def test_where_nothing_repeats_layers_are_blocks() -> None:
    model = build(*_stack(1))
    assert find_layers(model) == find_blocks(model)
    assert find_layers(build("g (float[N] x) => (float[N] y) { y = Relu(x) }")) == []


@pytest.mark.parametrize(
    ("scopes", "expected"),
    [
        ("", "MatMul"),
        ("['model', 'model.layers.0', 'model.layers.0.mlp.up_proj', 'linear_5']", "mlp.up_proj"),
        ("['model', 'model.encoder.3', 'linear']", "MatMul"),
        ("['model', 'model.lm_head', 'linear']", "lm_head"),
    ],
)
def test_the_place_in_a_layer_is_what_modules_say(scopes: str, expected: str) -> None:
    model = build(
        "g (float[N, 4] x) => (float[N, 4] y) { [op] y = MatMul(x, w) }", {"w": random_array(4, 4)}
    )
    node = node_named(model, "op")
    if scopes:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    assert place_in_layer(node) == expected
