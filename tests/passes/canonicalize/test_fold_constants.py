"""fold-constants: what depends on no input is computed once."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.passes.canonicalize.fold_constants import FoldConstants, FoldConstantsOptions
from tests.support.graphs import (
    body_of,
    build,
    externalize,
    initializer,
    op_types,
    random_array,
)
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, only_skip, reasons, run_pass

_TRANSPOSED = "g (float[N,3] x) => (float[N,4] y) { wt = Transpose (w) y = MatMul (x, wt) }"
_TIED = """
g (int64[N] ids) => (float[N,6] y) {
  x = Gather (w, ids)
  [turn] wt = Transpose (w)
  y = MatMul (x, wt)
}
"""
_SHAPE_CHAIN = """
g (float[2,3,4] x) => (y) {
  s = Shape (x)
  a = Gather (s, zero)
  b = Unsqueeze (a, axis)
  t = Concat <axis = 0> (b, rest)
  y = Reshape (x, t)
}
"""
_CHAIN_CONSTANTS = {
    "zero": np.array(0, np.int64),
    "axis": np.array([0], np.int64),
    "rest": np.array([-1], np.int64),
}
_CAPTURED = """
g (float[2,3] x, bool p) => (y) {
  y = If (p) <
    then_branch = then_g () => (a) { s = Sub (w, w) wt = Transpose (v) a = MatMul (x, wt) },
    else_branch = else_g () => (b) { n = Neg (w) b = MatMul (x, n) }
  >
}
"""
_SMALL = FoldConstantsOptions(growth_bytes=16)


def _weights(rows: int = 4, columns: int = 3, seed: int = 0) -> dict[str, Any]:
    return {"w": random_array(rows, columns, seed=seed)}


def test_a_weight_of_one_reader_is_transposed(tmp_path: Path) -> None:
    model = build(_TRANSPOSED, _weights())
    result = run_pass(FoldConstants(), model, tmp_path)
    assert op_types(model) == ["MatMul"]
    assert list(model.graph.initializers) == ["wt"]
    assert np.array_equal(initializer(model, "wt"), _weights()["w"].T)
    assert [rewrite.detail for rewrite in result.rewrites] == ["Transpose"]


def test_an_external_weight_is_transposed_slice_by_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompiler.execution.constant_nodes._SLICE_BYTES", 4096)
    weights = _weights(700, 300)
    model = externalize(
        build("g (float[N,300] x) => (y) { wt = Transpose (w) y = MatMul (x, wt) }", weights),
        tmp_path,
    )

    def forbidden(_self: ir.ExternalTensor) -> None:
        pytest.fail("the weight was read whole")

    monkeypatch.setattr(ir.ExternalTensor, "numpy", forbidden)
    run_pass(FoldConstants(), model, tmp_path, spill_bytes=1)
    monkeypatch.undo()
    made = model.graph.initializers["wt"].const_value
    assert isinstance(made, ir.ExternalTensor)
    assert np.array_equal(made.numpy(), weights["w"].T)


def test_reshaping_an_external_weight_moves_no_bytes(tmp_path: Path) -> None:
    text = "g (float[N,300] x) => (y) { wr = Reshape (w, s) y = MatMul (x, wr) }"
    weights = {"w": random_array(100, 300, 4), "s": np.array([300, -1], np.int64)}
    model = externalize(build(text, weights), tmp_path)
    before = model.graph.initializers["w"].const_value
    run_pass(FoldConstants(), model, tmp_path)
    made = model.graph.initializers["wr"].const_value
    assert isinstance(before, ir.ExternalTensor)
    assert isinstance(made, ir.ExternalTensor)
    assert (made.path, made.offset) == (before.path, before.offset)
    assert np.array_equal(made.numpy(), weights["w"].reshape(300, -1))


def test_shapes_fold_through_to_the_reshape(tmp_path: Path) -> None:
    model = build(_SHAPE_CHAIN, _CHAIN_CONSTANTS)
    run_pass(FoldConstants(), model, tmp_path)
    assert op_types(model) == ["Reshape"]
    assert initializer(model, "t").tolist() == [2, -1]


def test_only_the_known_sizes_of_a_shape_are_used(tmp_path: Path) -> None:
    text = _SHAPE_CHAIN.replace("float[2,3,4]", "float[N,3,4]")
    dynamic = build(text, _CHAIN_CONSTANTS)
    assert not run_pass(FoldConstants(), dynamic, tmp_path).rewrites
    known = {**_CHAIN_CONSTANTS, "zero": np.array(1, np.int64)}
    model = build(text, known)
    run_pass(FoldConstants(), model, tmp_path)
    assert op_types(model) == ["Shape", "Reshape"]  # eliminate-dead takes the Shape away
    assert initializer(model, "t").tolist() == [3, -1]


def test_slices_of_a_shape(tmp_path: Path) -> None:
    text = """g (float[N,3,4] x) => (y) {
      s = Shape (x)  t = Slice (s, one, end)  u = Concat <axis = 0> (all, t)  y = Reshape (x, u)
    }"""
    numbers = {"one": np.array([1]), "end": np.array([2**62]), "all": np.array([-1])}
    model = build(text, numbers)
    run_pass(FoldConstants(), model, tmp_path)
    assert initializer(model, "u").tolist() == [-1, 3, 4]


def test_bodies_fold_and_captured_weights_are_counted(tmp_path: Path) -> None:
    weights = {"w": random_array(3, 3), "v": random_array(3, 3, seed=1)}
    model = build(_CAPTURED, weights)
    run_pass(FoldConstants(), model, tmp_path)
    assert op_types(model) == ["If", "MatMul", "MatMul"] or "Sub" in op_types(model)
    assert list(body_of(model, "then_g").initializers) == ["wt"]
    assert list(body_of(model, "else_g").initializers) == ["n"]
    assert "v" not in model.graph.initializers
    for branch in (True, False):
        feeds = {"x": random_array(2, 3, seed=5), "p": np.array(branch)}
        assert_parity(build(_CAPTURED, weights), model, tolerance=0, feeds=feeds)


def test_a_constant_that_is_an_output_stays_one(tmp_path: Path) -> None:
    text = "g (float[2] x) => (float[2] y, float[2] k) { y = Relu (x) k = Neg (w) }"
    weights = {"w": np.ones(2, np.float32)}
    model = build(text, weights)
    run_pass(FoldConstants(), model, tmp_path)
    assert [value.name for value in model.graph.outputs] == ["y", "k"]
    assert_parity(build(text, weights), model, tolerance=0)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn])
def test_moves_any_type(tmp_path: Path, dtype: npt.DTypeLike) -> None:
    text = "g (float[N,3] x) => (y) { wt = Transpose (w) c = Cast <to = 1> (wt) y = MatMul (x, c) }"
    weight = random_array(4, 3).astype(dtype)
    model = build(text, {"w": weight})
    run_pass(FoldConstants(), model, tmp_path)
    assert op_types(model) == ["MatMul"]
    assert np.array_equal(initializer(model, "c"), weight.T.astype(np.float32))


def test_moves_four_bit_codes(tmp_path: Path) -> None:
    codes = np.array([[1, -2, 3, -8], [5, -6, 7, 0]], np.int8).astype(ml_dtypes.int4)
    text = """g (float[N,4] x) => (y) {
      t = Transpose (w)  d = DequantizeLinear (t, s)  y = MatMul (x, d)
    }"""
    model = build(text, {"w": ir.tensor(codes), "s": np.array(0.5, np.float32)})
    run_pass(FoldConstants(), model, tmp_path)
    tensor = model.graph.initializers["t"].const_value
    assert tensor is not None
    assert tensor.dtype == ir.DataType.INT4
    assert np.array_equal(tensor.numpy().astype(np.int8), codes.T.astype(np.int8))


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    text = "g (float[N,3] x) => (y) { c = Cast <to = 1> (w) y = MatMul (x, c) }"
    model = build(text, {"w": random_array(3, 4, dtype=np.float16)})
    run_pass(FoldConstants(_SMALL), model, tmp_path)
    assert op_types(model) == ["MatMul"]


def test_a_tied_weight_is_not_stored_twice(tmp_path: Path) -> None:
    model = build(_TIED, _weights(6, 50))
    skip = only_skip(run_pass(FoldConstants(_SMALL), model, tmp_path))
    assert skip.node == "turn"
    assert skip.reason == "w is also read by Gather_x, and folding would store it twice"


def test_two_equal_transposes_of_one_weight_fold(tmp_path: Path) -> None:
    text = """g (float[N,3] x) => (y) {
      a = Transpose (w)  b = Transpose (w)  c = MatMul (x, a)  d = MatMul (x, b)  y = Add (c, d)
    }"""
    model = build(text, _weights())
    run_pass(FoldConstants(_SMALL), model, tmp_path)
    assert op_types(model) == ["MatMul", "MatMul", "Add"]


def test_quantized_weights_stay_integers(tmp_path: Path) -> None:
    text = "g (float[N,3] x) => (y) { d = DequantizeLinear (w, s) y = MatMul (x, d) }"
    weights = {"w": np.ones((3, 4), np.int8), "s": np.array(0.5, np.float32)}
    skip = only_skip(run_pass(FoldConstants(), build(text, weights), tmp_path))
    assert skip.reason == "quantized weights stay integers"


def test_hand_written_dequantization_does_not_unfold(tmp_path: Path) -> None:
    text = "g (float[N,64] x) => (y) { f = Cast <to = 1> (w) d = Mul (f, s) y = MatMul (x, d) }"
    weights = {"w": np.ones((64, 64), np.int8), "s": np.array(0.5, np.float32)}
    skip = only_skip(run_pass(FoldConstants(_SMALL), build(text, weights), tmp_path))
    assert skip.reason == (
        "its result takes 16384 bytes and its inputs 4096; a folded node may add 16 bytes"
    )


@pytest.mark.parametrize(
    "node",
    [
        "ConstantOfShape (shape)",
        "Expand (one, shape)",
        "Tile (row, shape)",
        "Range (zero, huge, step)",
    ],
)
def test_explosions_are_refused_before_they_are_computed(tmp_path: Path, node: str) -> None:
    constants = {
        "shape": np.array([1 << 20, 1 << 12], np.int64),
        "one": np.ones((1, 1), np.float32),
        "row": np.ones((1, 1), np.float32),
        "zero": np.array(0, np.int64),
        "huge": np.array(1 << 29, np.int64),
        "step": np.array(1, np.int64),
    }
    used = {name: value for name, value in constants.items() if name in node}
    model = build(f"g () => (y) {{ y = {node} }}", used)
    (reason,) = reasons(run_pass(FoldConstants(), model, tmp_path))
    assert "more than 2 GiB" in reason


@pytest.mark.parametrize(
    "node", ["RandomNormalLike (w)", "Bernoulli (w)", "Dropout (w, ratio, yes)"]
)
def test_random_ops_stay(tmp_path: Path, node: str) -> None:
    constants = {
        "w": np.ones(2, np.float32),
        "ratio": np.array(0.5, np.float32),
        "yes": np.array(True),
    }
    used = {name: value for name, value in constants.items() if name in node.replace("ayes", "")}
    skip = only_skip(
        run_pass(FoldConstants(), build(f"g () => (y) {{ y = {node} }}", used), tmp_path)
    )
    assert skip.reason == "its result is random, and differs from run to run"


def test_what_the_runtime_cannot_compute_stays(tmp_path: Path) -> None:
    model = build("g () => (y) { y = Mul (w, w) }", {"w": np.ones(2, ml_dtypes.bfloat16)})
    skip = only_skip(run_pass(FoldConstants(), model, tmp_path))
    assert skip.reason == "ONNX Runtime's CPU kernels do not compute in BFLOAT16"


def test_an_input_with_a_default_is_not_constant(tmp_path: Path) -> None:
    model = build("g (float[2] x, float[2] w) => (y) { n = Neg (w) y = Add (x, n) }",
                  {"w": np.ones(2, np.float32)})  # fmt: skip
    assert model.graph.initializers["w"].is_graph_input()
    assert not run_pass(FoldConstants(), model, tmp_path).rewrites


def test_ops_with_bodies_and_of_other_domains_stay(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
    g (float[2] x) => (y) { n = com.microsoft.Gelu (w) y = Add (x, n) }"""
    model = build(text, {"w": np.ones(2, np.float32)})
    assert not run_pass(FoldConstants(), model, tmp_path).rewrites


@pytest.mark.parametrize(
    ("text", "weights"),
    [(_TRANSPOSED, _weights()), (_TIED, _weights(6, 50)), (_SHAPE_CHAIN, _CHAIN_CONSTANTS)],
)
def test_is_idempotent(tmp_path: Path, text: str, weights: dict[str, Any]) -> None:
    assert_idempotent(FoldConstants(), build(text, weights), tmp_path)


def test_keeps_numerics(tmp_path: Path) -> None:
    text = """g (float[N,8] x) => (y) {
      e = Exp (w)  s = Softmax (e)  m = MatMul (s, w)  r = Reciprocal (m)  y = MatMul (x, r)
    }"""
    weights = {"w": random_array(8, 8)}
    model = build(text, weights)
    run_pass(FoldConstants(), model, tmp_path)
    assert op_types(model) == ["MatMul"]
    assert FoldConstants.tolerance == 1e-6
    assert_parity(build(text, weights), model, tolerance=1e-6, dims={"N": 5})
