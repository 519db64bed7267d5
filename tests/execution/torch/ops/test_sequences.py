"""Sequences and optionals."""

from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import build, random_array
from tests.support.torch_programs import agrees_with_runtime, gradients_agree, run_program

_SEQUENCE = "s = SequenceConstruct(a, b, c)"
_INPUTS = "float[2] a, float[2] b, float[2] c"
_ABC = {name: random_array(2, seed=seed) for seed, name in enumerate("abc")}


def _outputs(body: str, *declared: str, feeds: Any = None, weights: Any = None) -> list[Any]:
    text = f"g ({_INPUTS}) => ({', '.join(declared)}) {{ {_SEQUENCE} {body} }}"
    return list(run_program(text, _ABC if feeds is None else feeds, weights).values())


@pytest.mark.parametrize(
    ("position", "order"), [("", "abcd"), (", p0", "dabc"), (", p1", "abdc"), (", p3", "abcd")]
)
def test_inserts_at_positions_from_both_ends(position: str, order: str) -> None:
    positions = {"p0": np.array(0), "p1": np.array(-1), "p3": np.array(3)}
    used = {name: each for name, each in positions.items() if name in position}
    body = f"d = Neg(a) t = SequenceInsert(s, d{position}) y = ConcatFromSequence<axis = 0>(t)"

    (found,) = _outputs(body, "float[] y", weights=used)

    arrays = {**_ABC, "d": -_ABC["a"]}
    np.testing.assert_array_equal(found, np.concatenate([arrays[name] for name in order]))


@pytest.mark.parametrize(("position", "order"), [("", "ab"), (", p", "ac")])
def test_erases(position: str, order: str) -> None:
    body = f"t = SequenceErase(s{position}) n = SequenceLength(t) y = SequenceAt(t, q)"
    weights = {"q": np.array(-1), **({"p": np.array(-2)} if position else {})}

    length, last = _outputs(body, "int64 n", "float[] y", weights=weights)

    assert length.item() == 2
    np.testing.assert_array_equal(last, _ABC[order[-1]])


@pytest.mark.parametrize(
    ("body", "position"),
    [
        ("y = SequenceAt(s, p)", 3),
        ("t = SequenceErase(s, p) y = SequenceAt(t, p)", -4),
        ("t = SequenceInsert(s, a, p) y = SequenceAt(t, p)", 4),
    ],
)
def test_refuses_positions_outside(body: str, position: int) -> None:
    with pytest.raises(ModelError, match=f"position {position} is outside of a sequence of 3"):
        _outputs(body, "float[] y", weights={"p": np.array(position)})


@pytest.mark.parametrize("split", ["<keepdims = 0>(x)", "<axis = 1>(x, one)", "(x, list)"])
def test_splits_and_joins_as_onnx_runtime_does(split: str) -> None:
    join = "<axis = 0, new_axis = 1>" if "keepdims" in split else "<axis = 1>"
    text = f"""
      g (float[4, 5] x) => (float[] y, int64 n) {{
        s = SplitToSequence{split}
        n = SequenceLength(s)
        p = Constant<value_int = 0>()
        y = {"ConcatFromSequence" + join + "(s)" if "list" not in split else "SequenceAt(s, p)"}
      }}
    """
    weights = {"one": np.array(2), "list": np.array([3, 1])}
    used = {name: each for name, each in weights.items() if name in split}

    agrees_with_runtime(text, {"x": random_array(4, 5)}, used, tolerance=0)


def test_splits_strings() -> None:
    text = "g (string[3] x) => (string[] y) { s = SplitToSequence(x) y = SequenceAt(s, p) }"

    (found,) = run_program(
        text, {"x": np.array(["a", "b", "c"], object)}, {"p": np.array(1)}
    ).values()

    assert found.tolist() == ["b"]


def test_gradients_pass_through_sequences() -> None:
    text = """
      g (double[4, 3] x) => (double[] y) {
        s = SplitToSequence<axis = 0, keepdims = 0>(x)
        first = SequenceAt(s, zero)
        t = SequenceInsert(s, first)
        u = SequenceErase(t, one)
        y = ConcatFromSequence<axis = 1, new_axis = 1>(u)
      }
    """
    weights = {"zero": np.array(0), "one": np.array(1)}

    gradients_agree(text, {"x": random_array(4, 3, dtype=np.float64)}, weights)


def test_maps_a_body_that_captures_over_sequences_and_tensors() -> None:
    text = """
      g (double[2] a, double[2] b, double[2] k) => (double[] y, double[] z) {
        s = SequenceConstruct(a, b)
        t = SequenceConstruct(b, b)
        e = Exp(k)
        m, n = SequenceMap(s, t, k) <body = each (double[2] u, double[2] v, double[2] w)
          => (double[2] p, double[2] q) {
            uv = Mul(u, v)
            p = Add(uv, e)
            q = Mul(u, w)
          }>
        y = ConcatFromSequence<axis = 0>(m)
        z = ConcatFromSequence<axis = 0>(n)
      }
    """
    feeds = {name: random_array(2, dtype=np.float64, seed=at) for at, name in enumerate("abk")}

    gradients_agree(text, feeds)
    found = run_program(text, feeds)
    a, b, k = feeds.values()
    np.testing.assert_allclose(found["y"], [*(a * b + np.exp(k)), *(b * b + np.exp(k))])
    np.testing.assert_allclose(found["z"], [*(a * k), *(b * k)])


def test_a_sequence_of_nothing_can_be_filled() -> None:
    text = """
      g (float[2] a) => (float[] y) {
        s = SequenceEmpty()
        t = SequenceInsert(s, a)
        y = ConcatFromSequence<axis = 0>(t)
      }
    """

    agrees_with_runtime(text, {"a": random_array(2)}, tolerance=0)


def test_optionals_of_tensors_sequences_and_nothing() -> None:
    text = """
      g (float[2] a) => (float[] y, bool has, bool hasnt) {
        s = SequenceConstruct(a, a)
        o = Optional(s)
        has = OptionalHasElement(o)
        hasnt = OptionalHasElement()
        t = OptionalGetElement(o)
        y = ConcatFromSequence<axis = 0>(t)
      }
    """

    found = run_program(text, {"a": random_array(2)}, opset=18)

    assert found["has"].item() is True
    assert found["hasnt"].item() is False
    assert found["y"].shape == (4,)


def test_refuses_the_element_of_an_empty_optional() -> None:
    text = "g (optional(float[2]) a) => (float[] y) { y = OptionalGetElement(a) }"
    program = Program.from_subgraph(build(text, opset=18))

    with pytest.raises(ModelError, match="the optional is empty"):
        program({"a": None})
    assert torch.equal(program({"a": torch.ones(2)})["y"], torch.ones(2))
