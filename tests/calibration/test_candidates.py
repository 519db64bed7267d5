"""What may be left out, and where its damage shows."""

import onnx_ir as ir

from qcompiler.calibration.candidates import (
    carry_ranges,
    find_candidates,
    nearby_places,
    read_by,
)
from qcompiler.ir.provenance import BYTES_BEFORE, RANGE, SCHEME, SHARES
from qcompiler.ir.shapes import infer_shapes
from tests.support.graphs import build, node_named, random_array
from tests.support.sensitive import OPS, planned


def tied() -> ir.Model:
    model = build(
        """g (int64[3] i) => (float[3, 8] y) {
            [look] e = Gather(w, i)
            [middle] m = MatMul(e, v)
            [flip] t = Transpose<perm=[1, 0]>(w)
            [head] y = MatMul(m, t) }""",
        {"w": random_array(8, 4), "v": random_array(4, 4)},
    )
    for name in ("look", "middle", "head"):
        node_named(model, name).metadata_props[SCHEME] = "w8a16:sym"
        node_named(model, name).metadata_props[BYTES_BEFORE] = "128"
    return model


def chain(layers: int) -> ir.Model:
    steps = " ".join(
        f"[op{i}] a{i} = MatMul(b{i - 1}, w{i}) [tanh{i}] b{i} = Tanh(a{i})"
        for i in range(1, layers + 1)
    )
    text = f"g (float[2, 4] b0) => (float[2, 4] b{layers}) {{ {steps} }}"
    model = build(text, {f"w{i}": random_array(4, 4, seed=i) for i in range(1, layers + 1)})
    infer_shapes(model)
    return model


def test_ops_that_share_a_weight_are_one_candidate() -> None:
    found = find_candidates(tied())
    assert [c.nodes for c in found] == [("look", "head"), ("middle",)]
    assert found[0].op_type == "Gather"


def test_ops_left_in_float_are_none() -> None:
    model = tied()
    node_named(model, "middle").metadata_props[SCHEME] = "float"
    assert [c.nodes for c in find_candidates(model)] == [("look", "head")]


def test_what_shares_a_scale_gets_the_range_it_stands_for() -> None:
    model = chain(2)
    values = {value.name: value for node in model.graph for value in node.outputs}
    values["a1"].metadata_props[RANGE] = "[0, 1]"
    values["b1"].metadata_props[SHARES] = "a1"
    values["a2"].metadata_props[SHARES] = "b1"
    carry_ranges(model.graph)
    assert [values[n].metadata_props.get(RANGE) for n in ("a1", "b1", "a2", "b2")] == [
        *(["[0, 1]"] * 3),
        None,
    ]


def test_damage_is_looked_at_three_blocks_on_and_behind_what_follows_alone() -> None:
    places = nearby_places(chain(6))
    assert places["op1"] == ("b4",)
    assert places["op2"] == ("b5",)
    assert places["op3"] == places["op6"] == ("b6",)


def test_what_a_candidate_reads() -> None:
    model, _ = planned()
    assert [read_by(model, c) for c in find_candidates(model)] == [["x"], ["b"], ["d"], ["y"]]
    assert len(find_candidates(model)) == len(OPS)
