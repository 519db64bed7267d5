"""Islands of float32: which ops join them, and where Casts go; bodies and ends of a model."""

from pathlib import Path

import numpy as np
import pytest

from qcompiler.errors import UsageError
from qcompiler.quant.selector import Selector
from tests.support.casting import (
    F16,
    F32,
    LOOP,
    MLP,
    WEIGHT,
    cast,
    casts,
    data,
    float32_nodes,
    worst_error,
)
from tests.support.graphs import (
    body_of,
    build,
    node_named,
)


def test_islands_that_the_user_asks_for(tmp_path: Path) -> None:
    model = build(MLP, {"w": WEIGHT})
    result = cast(model, tmp_path, float32=(Selector(name="fc?"),))
    assert float32_nodes(result) == {
        "fc1": "it was asked for by name=fc?",
        "fc2": "it was asked for by name=fc?",
        "act": "it stands between float32 ops, and in 16 bits would take more Casts",
    }
    assert casts(model) == []
    by_op = build(MLP, {"w": WEIGHT})
    assert set(float32_nodes(cast(by_op, tmp_path, float32=(Selector(op_type="Relu"),)))) == {"act"}
    assert len(casts(by_op)) == 4
    with pytest.raises(UsageError, match="means no node"):
        cast(build(MLP, {"w": WEIGHT}), tmp_path, float32=(Selector(name="fc3"),))


def test_a_long_way_between_islands_is_worth_two_casts(tmp_path: Path) -> None:
    chain = " ".join(f"v{i + 1} = Relu(v{i})" for i in range(6))
    text = f"g (float[N, 8] x) => (float[N, 8] y) {{ v0 = Exp(x) {chain} y = Exp(v6) }}"
    long = build(text)
    cast(long, tmp_path)
    assert casts(long) == [("v0", "FLOAT16"), ("v6", "FLOAT")]
    short = build(text.replace(chain, "v6 = Relu(v0)"))
    cast(short, tmp_path)
    assert casts(short) == []


def test_what_only_moves_numbers_joins_for_nothing(tmp_path: Path) -> None:
    moves = " ".join(f"v{i + 1} = Transpose(v{i})" for i in range(6))
    text = f"g (float[8, 8] x) => (float[8, 8] y) {{ v0 = Exp(x) {moves} y = Exp(v6) }}"
    model = build(text)
    cast(model, tmp_path)
    assert casts(model) == []


def test_one_cast_serves_all_readers(tmp_path: Path) -> None:
    text = """g (float[N, 32] x) => (float[N, 32] y) {
        a = MatMul(x, w) e1 = Exp(a) e2 = Pow(a, a) e3 = Exp(a)
        s = Sum(e1, e2, e3) b = MatMul(a, w) y = Add(s, b) }"""
    model = build(text, {"w": WEIGHT / 10})
    cast(model, tmp_path, data(2, 32, scale=0.1))
    assert [name for name, _ in casts(model)].count("a") == 1
    assert len(casts(model)) == 3


def test_casts_of_the_source_are_not_repeated(tmp_path: Path) -> None:
    """A cast to float16 of what is float16 now, and one back."""
    text = """g (float[N, 32] x) => (float[N, 32] y) {
        a = MatMul(x, w) [down] b = Cast<to=10>(a) [r] c = Relu(b) [up] d = Cast<to=1>(c)
        [exp] y = Exp(d) }"""
    model = build(text, {"w": WEIGHT / 10})
    result = cast(model, tmp_path, data(2, 32))
    assert casts(model) == [("x", "FLOAT16"), ("c", "FLOAT")]
    assert "down" in [rewrite.node for rewrite in result.rewrites if "eliminate" in rewrite.rule]


def test_inputs_and_outputs_can_be_16_bits(tmp_path: Path) -> None:
    model = build(MLP, {"w": WEIGHT})
    cast(model, tmp_path, data(4, 32), keep_io=False)
    assert casts(model) == []
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [F16, F16]


def test_an_input_out_of_range_stays_float32(tmp_path: Path) -> None:
    model = build(
        "g (float[N, 32] x) => (float[N, 32] y) { n = Tanh(x) y = MatMul(n, w) }", {"w": WEIGHT}
    )
    cast(model, tmp_path, data(4, 32, scale=1e6), keep_io=False)
    assert model.graph.inputs[0].dtype == F32
    assert model.graph.outputs[0].dtype == F16


def test_an_output_that_others_read_keeps_its_name(tmp_path: Path) -> None:
    text = """g (float[N, 32] x) => (float[N, 32] a, float[N, 32] y) {
        a = MatMul(x, w) y = MatMul(a, w) }"""
    before, after = build(text, {"w": WEIGHT}), build(text, {"w": WEIGHT})
    cast(after, tmp_path, data(2, 32))
    assert [value.name for value in after.graph.outputs] == ["a", "y"]
    assert len(casts(after)) == 3
    assert worst_error(before, after, data(2, 32)) < 2e-3


BRANCHES = """g (bool c, float[N, 32] x) => (float[N, 32] y) {
    a = MatMul(x, w)
    [if] b = If (c) <
        then_branch = t () => (float[N, 32] o1) { [then] o1 = Exp(a) },
        else_branch = e () => (float[N, 32] o2) { [else] o2 = MatMul(a, w) } >
    y = MatMul(b, w) }"""


@pytest.mark.parametrize("condition", [True, False])
def test_branches_return_one_type(condition: bool, tmp_path: Path) -> None:
    before, after = build(BRANCHES, {"w": WEIGHT}), build(BRANCHES, {"w": WEIGHT})
    feeds = {"c": np.array(condition), **data(4, 32)}
    result = cast(after, tmp_path, feeds)
    assert set(float32_nodes(result)) == {"then"}
    # One value is cast for the branch, one in it for what it returns.
    assert casts(after) == [
        ("x", "FLOAT16"),
        ("a", "FLOAT"),
        ("o1", "FLOAT16"),
        ("y.float16", "FLOAT"),
    ]
    assert {body_of(after, name).outputs[0].dtype for name in "te"} == {F16}
    assert worst_error(before, after, feeds) < 3e-3


@pytest.mark.parametrize(("factor", "kept"), [(2.0, set()), (1e5, {"grow", "in", "loop"})])
def test_carried_values_keep_one_type(factor: float, kept: set[str], tmp_path: Path) -> None:
    weights = {"w": WEIGHT, "factor": np.float32(factor)}
    before, after = build(LOOP, weights), build(LOOP, weights)
    feeds = {"n": np.array(3), **data(4, 32)}
    result = cast(after, tmp_path, feeds)
    assert kept <= set(float32_nodes(result))
    body = body_of(after, "body")
    carried = [body.inputs[2], body.outputs[1], node_named(after, "loop").outputs[0]]
    assert {value.dtype for value in carried} == {F32 if kept else F16}
    assert worst_error(before, after, feeds) < 4e-3
    none = {"n": np.array(0), **data(4, 32)}
    assert worst_error(before, after, none) < 4e-3


def test_scan_bodies(tmp_path: Path) -> None:
    text = """g (float[T, 32] x, float[32] h) => (float[32] last, float[T, 32] y) {
        last, y = Scan <num_scan_inputs = 1, body = body (float[32] s, float[32] v)
            => (float[32] s2, float[32] o) { a = Add(s, v) s2 = MatMul(a, w) o = Exp(s2) } >(h, x)
        }"""
    before, after = build(text, {"w": WEIGHT / 3}), build(text, {"w": WEIGHT / 3})
    feeds = {**data(5, 32), **data(32, name="h")}
    cast(after, tmp_path, feeds)
    body = body_of(after, "body")
    assert [value.dtype for value in body.outputs] == [F32, F32]
    (product,) = (node for node in body if node.op_type == "MatMul")
    assert product.outputs[0].dtype == F16
    assert worst_error(before, after, feeds) < 5e-3
