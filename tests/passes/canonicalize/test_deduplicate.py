"""deduplicate: equal constants are stored once, equal values computed once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.provenance import ORIGIN
from qcompiler.ir.weights import read_slice
from qcompiler.passes.canonicalize import deduplicate
from qcompiler.passes.canonicalize.deduplicate import Deduplicate
from tests.support.graphs import body_of, build, externalize, node_named, op_types, random_array
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

_TWO = """
g (float[N,8] x) => (y) {
  [first] a = MatMul (x, w1)
  [second] b = MatMul (x, w2)
  c = Relu (a)
  d = Relu (b)
  y = Add (c, d)
}
"""
_SAME = {"w1": random_array(8, 8), "w2": random_array(8, 8)}
_BODY = """
g (float[2,32] x, bool p) => (y) {
  h = MatMul (x, w)
  z = If (p) <
    then_branch = then_g () => (a) { a = MatMul (x, v) },
    else_branch = else_g () => (b) { m = MatMul (x, u) n = MatMul (x, u) k = Add (m, n)
      b = Add (k, s) }
  >
  i = Add (h, t)
  y = Add (i, z)
}
"""


def _body_weights() -> dict[str, Any]:
    big, small = random_array(32, 32), np.ones(1, np.float32)
    return {"w": big, "then_g/v": big, "else_g/u": big, "t": small, "else_g/s": small}


def test_equal_weights_and_all_that_follows_are_shared(tmp_path: Path) -> None:
    model = build(_TWO, _SAME)
    result = run_pass(Deduplicate(), model, tmp_path)
    assert op_types(model) == ["MatMul", "Relu", "Add"]
    assert list(model.graph.initializers) == ["w1"]
    assert result.rewrites[0].detail == "initializer equal to w1"
    assert node_named(model, "first").metadata_props[ORIGIN] == '["first", "second"]'
    assert_parity(build(_TWO, _SAME), model, tolerance=0)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(random_array(8, 8, seed=1), id="values"),
        pytest.param(random_array(8, 8) * np.float32(1 + 2**-23), id="last-bit"),
        pytest.param(np.concatenate([random_array(8, 8)[:7], np.zeros((1, 8))]), id="last-row"),
    ],
)
def test_unequal_weights_stay(tmp_path: Path, other: Any) -> None:
    model = build(_TWO, {**_SAME, "w2": np.asarray(other, np.float32)})
    assert not run_pass(Deduplicate(), model, tmp_path).rewrites


def test_zeros_of_unlike_sign_and_equal_bytes_of_another_type_stay(tmp_path: Path) -> None:
    text = "g (float[2] x) => (y, z) { a = Add (x, p) y = Add (a, m) z = Cast <to = 1> (i) }"
    zeros = np.zeros(2, np.float32)
    model = build(text, {"p": zeros, "m": -zeros, "i": np.zeros(2, np.int32)})
    assert not run_pass(Deduplicate(), model, tmp_path).rewrites


def test_large_weights_are_compared_by_their_first_bytes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"w1": random_array(512, 512), "w2": random_array(512, 512, seed=1)}
    model = externalize(build(_TWO.replace("float[N,8]", "float[N,512]"), weights), tmp_path)
    rows: list[int] = []

    def counting(tensor: ir.TensorProtocol, axis: int, start: int, stop: int) -> Any:
        rows.append(stop - start)
        return read_slice(tensor, axis, start, stop)

    monkeypatch.setattr("qcompiler.passes.canonicalize.deduplicate.read_slice", counting)
    assert not run_pass(Deduplicate(), model, tmp_path).rewrites
    assert sum(rows) == 4  # two rows of 2 KiB each


def test_external_weights_of_one_place_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = externalize(build(_TWO, _SAME), tmp_path)
    source = model.graph.initializers["w1"].const_value
    assert isinstance(source, ir.ExternalTensor)
    model.graph.initializers["w2"].const_value = ir.ExternalTensor(
        source.location, source.offset, source.length, source.dtype,
        shape=ir.Shape(source.shape.numpy()), name="w2", base_dir=source.base_dir,
    )  # fmt: skip
    pieces: list[int] = []
    original = deduplicate._pieces

    def counting(tensor: ir.TensorProtocol, nbytes: int) -> Iterator[bytes]:
        pieces.append(nbytes)
        return original(tensor, nbytes)

    monkeypatch.setattr(deduplicate, "_pieces", counting)
    run_pass(Deduplicate(), model, tmp_path)
    assert list(model.graph.initializers) == ["w1"]
    assert len(pieces) == 3  # the first bytes of both, all bytes of one


def test_bodies_share_large_weights_with_what_is_around_them(tmp_path: Path) -> None:
    model = build(_BODY, _body_weights())
    run_pass(Deduplicate(), model, tmp_path)
    assert not body_of(model, "then_g").initializers
    assert list(body_of(model, "else_g").initializers) == ["s"]  # small ones stay local
    assert op_types(model).count("MatMul") == 3  # one a graph
    for branch in (True, False):
        feeds = {"x": random_array(2, 32, seed=3), "p": np.array(branch)}
        assert_parity(build(_BODY, _body_weights()), model, tolerance=0, feeds=feeds)


def test_sibling_bodies_keep_their_own(tmp_path: Path) -> None:
    text = """g (float[2,32] x, bool p) => (y) { y = If (p) <
      then_branch = then_g () => (a) { a = MatMul (x, v) },
      else_branch = else_g () => (b) { b = MatMul (x, u) } > }"""
    weights = {"then_g/v": random_array(32, 32), "else_g/u": random_array(32, 32)}
    assert not run_pass(Deduplicate(), build(text, weights), tmp_path).rewrites


def test_outputs_keep_their_names(tmp_path: Path) -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) { [a] y = Relu (x) [b] z = Relu (x) }"
    skip = only_skip(run_pass(Deduplicate(), build(text), tmp_path))
    assert skip.node == "b"
    assert skip.reason == "it computes the same as a, and its result z is a graph output"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("RandomNormalLike (x)", "RandomNormalLike (x)"),
        ("LeakyRelu <alpha = 0.1> (x)", "LeakyRelu <alpha = 0.2> (x)"),
        ("Sub (x, x)", "Add (x, x)"),
        ("QuantizeLinear (x, s)", "QuantizeLinear (x, s)"),
        ("Cast <to = 1> (x)", "Cast <to = 10> (x)"),
    ],
)
def test_what_is_not_merged(tmp_path: Path, first: str, second: str) -> None:
    text = f"g (float[2] x) => (y, z) {{ a = {first} b = {second} y = Neg (a) z = Abs (b) }}"
    weights = {"s": np.array(1, np.float32)} if "Quantize" in first else {}
    assert not run_pass(Deduplicate(), build(text, weights), tmp_path).rewrites


def test_defaults_of_inputs_are_not_shared(tmp_path: Path) -> None:
    text = "g (float[2] x, float[2] d) => (y) { a = Add (x, d) y = Add (a, w) }"
    model = build(text, {"d": np.ones(2, np.float32), "w": np.ones(2, np.float32)})
    assert not run_pass(Deduplicate(), model, tmp_path).rewrites


@pytest.mark.parametrize(("text", "weights"), [(_TWO, _SAME), (_BODY, _body_weights())])
def test_is_idempotent(tmp_path: Path, text: str, weights: dict[str, Any]) -> None:
    assert_idempotent(Deduplicate(), build(text, weights), tmp_path)


def test_half_precision(tmp_path: Path) -> None:
    half = {name: np.asarray(value, np.float16) for name, value in _SAME.items()}
    text = _TWO.replace("float[", "float16[")
    model = build(text, half)
    run_pass(Deduplicate(), model, tmp_path)
    assert op_types(model) == ["MatMul", "Relu", "Add"]
    assert_parity(build(text, half), model, tolerance=0)
