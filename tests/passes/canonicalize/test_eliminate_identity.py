"""eliminate-identity: nodes that give back what they are given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.passes.canonicalize.eliminate_identity import EliminateIdentity
from tests.support.graphs import body_of, build, op_types
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, only_skip, reasons, run_pass

_SCALARS: dict[str, Any] = {
    "one": np.array(1, np.float32),
    "zero": np.array(0, np.float32),
    "minus_zero": np.array(-0.0, np.float32),
    "row_of_ones": np.ones((1, 3), np.float32),
    "many_ones": np.ones((2, 1, 1), np.float32),
    "no_pads": np.zeros(4, np.int64),
    "axes": np.zeros(0, np.int64),
    "keep": np.array([0, -1], np.int64),
    "same": np.array([2, 3], np.int64),
    "ones": np.array([1, 1], np.int64),
    "starts": np.array([0, 0], np.int64),
    "ends": np.array([2, 2**62], np.int64),
    "cut": np.array([2, 2], np.int64),
    "ratio": np.array(0.5, np.float32),
    "yes": np.array(True),
    "no": np.array(False),
}
_REMOVED = [
    *("Identity (h)", "Dropout (h)", "Dropout (h, ratio, no)", "Cast <to = 1> (h)"),
    *("Transpose <perm = [0, 1]> (h)", "Reshape (h, keep)", "Reshape (h, same)", "Squeeze (h)"),
    *("Unsqueeze (h, axes)", "Flatten (h)", "Expand (h, ones)", "Pad (h, no_pads)"),
    *("Slice (h, starts, ends)", "Concat <axis = 0> (h)", "Add (h, minus_zero)", "Sub (h, zero)"),
    *("Mul (h, one)", "Mul (one, h)", "Mul (h, row_of_ones)", "Div (h, one)"),
]
_KEPT = [
    *("Dropout (h, ratio, yes)", "Cast <to = 10> (h)", "Transpose <perm = [1, 0]> (h)"),
    *("Reshape (h, flat)", "Expand (h, more)", "Pad (h, some_pads)", "Slice (h, starts, cut)"),
    *("Concat <axis = 0> (h, h)", "Add (h, one)", "Mul (h, zero)", "Div (one, h)", "Sub (zero, h)"),
]
_BODY = """
g (float[2] x, bool p) => (float[2] y, float[2] z) {
  i = Identity (x)
  h = Relu (i)
  y = If (p) <
    then_branch = then_g () => (float[2] a) { a = Identity (h) },
    else_branch = else_g () => (float[2] b) { j = Identity (h) k = Neg (j) b = Identity (k) }
  >
  z = Identity (x)
}
"""


def _model(node: str) -> Any:
    extra = {
        "flat": np.array([-1], np.int64),
        "more": np.array([4, 1, 1], np.int64),
        "some_pads": np.array([0, 1, 0, 0], np.int64),
    }
    words = node.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: value for name, value in {**_SCALARS, **extra}.items() if name in words}
    text = f"g (float[2,3] x) => (y) <float[2,3] h> {{ h = Neg (x) i = {node} y = Abs (i) }}"
    return build(text, used)


@pytest.mark.parametrize("node", _REMOVED)
def test_no_ops_go_and_bits_stay(tmp_path: Path, node: str) -> None:
    model = _model(node)
    result = run_pass(EliminateIdentity(), model, tmp_path)
    assert op_types(model) == ["Neg", "Abs"]
    assert [rewrite.node for rewrite in result.rewrites] == [f"{node.split()[0]}_i"]
    assert not model.graph.initializers
    assert_parity(_model(node), model, tolerance=0)


@pytest.mark.parametrize("node", _KEPT)
def test_what_changes_something_stays(tmp_path: Path, node: str) -> None:
    model = _model(node)
    assert not run_pass(EliminateIdentity(), model, tmp_path).rewrites
    assert len(op_types(model)) == 3


def test_a_reshape_to_the_sizes_it_has_goes_also_when_one_is_unknown(tmp_path: Path) -> None:
    text = "g (float[N,3] x) => (y) { i = Reshape (x, s) y = Relu (i) }"
    model = build(text, {"s": np.array([-1, 3], np.int64)})
    run_pass(EliminateIdentity(), model, tmp_path)
    assert op_types(model) == ["Relu"]


def test_a_reshape_that_fixes_an_unknown_size_stays(tmp_path: Path) -> None:
    text = "g (float[N,M] x) => (y) { i = Reshape (x, s) y = Relu (i) }"
    model = build(text, {"s": np.array([2, -1], np.int64)})
    assert not run_pass(EliminateIdentity(), model, tmp_path).rewrites


def test_graph_outputs_keep_their_names(tmp_path: Path) -> None:
    text = (
        "g (float[2] x) => (float[2] y, float[2] h) { h = Relu (x) t = Neg (h) y = Identity (t) }"
    )
    model = build(text)
    run_pass(EliminateIdentity(), model, tmp_path)
    assert op_types(model) == ["Relu", "Neg"]
    assert [value.name for value in model.graph.outputs] == ["y", "h"]
    assert_parity(build(text), model, tolerance=0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "g (float[2] x) => (float[2] y) { y = Identity (x) }",
            "it hands x, which no node of the same graph computes, to the graph output y",
        ),
        (
            "g (float[2] x) => (float[2] h, float[2] y) { h = Relu (x) y = Identity (h) }",
            "h and y are both graph outputs, and both names must stay",
        ),
    ],
)
def test_two_names_that_must_stay(tmp_path: Path, text: str, reason: str) -> None:
    assert only_skip(run_pass(EliminateIdentity(), build(text), tmp_path)).reason == reason


def test_a_body_still_returns_a_value_of_its_own(tmp_path: Path) -> None:
    model = build(_BODY)
    result = run_pass(EliminateIdentity(), model, tmp_path)
    assert [node.op_type for node in body_of(model, "then_g")] == ["Identity"]
    assert [node.op_type for node in body_of(model, "else_g")] == ["Neg"]
    assert [value.name for value in body_of(model, "else_g").outputs] == ["b"]
    assert reasons(result)[0].startswith("it hands h, which no node of the same graph computes")
    for branch in (True, False):
        feeds = {"x": np.ones(2, np.float32), "p": np.array(branch)}
        assert_parity(build(_BODY), model, tolerance=0, feeds=feeds)


@pytest.mark.parametrize("node", ["Add (h, zero)", "Sub (h, minus_zero)"])
def test_a_zero_of_the_wrong_sign_stays(tmp_path: Path, node: str) -> None:
    skip = only_skip(run_pass(EliminateIdentity(), _model(node), tmp_path))
    assert skip.reason == "a zero of this sign turns -0.0 into +0.0, which is not exact"


def test_an_operand_that_broadcasts_stays(tmp_path: Path) -> None:
    skip = only_skip(run_pass(EliminateIdentity(), _model("Mul (h, many_ones)"), tmp_path))
    assert skip.reason == "its constant operand may broadcast the other to a larger shape"


def test_integers_have_one_zero(tmp_path: Path) -> None:
    model = build("g (int64[2] x) => (y) { i = Add (x, z) y = Neg (i) }", {"z": np.array(0)})
    run_pass(EliminateIdentity(), model, tmp_path)
    assert op_types(model) == ["Neg"]


def test_an_input_with_a_default_is_no_neutral_operand(tmp_path: Path) -> None:
    text = "g (float[2] x, float[1] one) => (y) { i = Mul (x, one) y = Neg (i) }"
    model = build(text, {"one": np.ones(1, np.float32)})
    assert not run_pass(EliminateIdentity(), model, tmp_path).rewrites


def test_half_precision(tmp_path: Path) -> None:
    model = build(
        "g (float16[2] x) => (y) { i = Mul (x, one) y = Neg (i) }", {"one": np.ones(1, np.float16)}
    )
    run_pass(EliminateIdentity(), model, tmp_path)
    assert op_types(model) == ["Neg"]


@pytest.mark.parametrize("text", [_BODY, "g (float[2] x) => (float[2] y) { y = Identity (x) }"])
def test_is_idempotent(tmp_path: Path, text: str) -> None:
    assert_idempotent(EliminateIdentity(), build(text), tmp_path)
