"""All canonicalizing passes in the order of the pipeline, verified after each by the manager."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.weights import WeightStore
from qcompiler.passes.canonicalize.assign_names import AssignNames
from qcompiler.passes.canonicalize.convert_opset import ConvertOpset, ConvertOpsetOptions
from qcompiler.passes.canonicalize.deduplicate import Deduplicate
from qcompiler.passes.canonicalize.eliminate_dead import EliminateDead
from qcompiler.passes.canonicalize.eliminate_identity import EliminateIdentity
from qcompiler.passes.canonicalize.fold_batch_norm import FoldBatchNorm
from qcompiler.passes.canonicalize.fold_constants import FoldConstants
from qcompiler.passes.canonicalize.inline_functions import InlineFunctions
from qcompiler.passes.canonicalize.lift_constants import LiftConstants
from qcompiler.passes.canonicalize.verify_canonical import VerifyCanonical
from qcompiler.rewriting.base import Pass, PassContext
from qcompiler.rewriting.manager import PassManager, stage_of
from qcompiler.rewriting.stages import Stage
from tests.support.graphs import build, externalize, op_types, random_array, serialized
from tests.support.parity import assert_parity, random_feeds

# A convolution with its norm in a function, a Loop whose body captures values and has constants
# of its own, and a weight that is transposed in front of its only reader.
_TEXT = """<ir_version: 10, opset_import: ["" : 17, "my" : 1]>
g (float[N,3,8,8] x, int64 count) => (float[N,5] y, float[N,4] state) {
  h = my.block (x)
  p = GlobalAveragePool (h)
  axes = Constant <value_ints = [2, 3]> ()
  q = Squeeze (p, axes)
  yes = Constant <value = bool {1}> ()
  state = Loop (count, yes, q) <body = step
    (int64 i, bool go, float[N,4] s) => (bool on, float[N,4] t) {
    half = Constant <value_float = 0.5> ()
    turned = Transpose (v)
    m = MatMul (s, turned)
    d = Mul (m, half)
    t = Add (d, q)
    on = Identity (go)
  }>
  wt = Transpose (w)
  k = MatMul (state, wt)
  y = Identity (k)
}
<domain: "my", opset_import: ["" : 17]>
block (x) => (y) {
  f = Constant <value = float[4,3,1,1] {1,2,3,4,5,6,7,8,9,10,11,12}> ()
  one = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()
  h = Conv (x, f)
  n = BatchNormalization (h, one, one, one, one)
  y = Relu (n)
}
"""
_WEIGHTS = {"v": random_array(4, 4), "w": random_array(5, 4), "dead": random_array(9)}


def _passes() -> list[Pass]:
    return [
        InlineFunctions(),
        ConvertOpset(ConvertOpsetOptions(version=21)),
        LiftConstants(),
        FoldConstants(),
        EliminateIdentity(),
        FoldBatchNorm(),
        Deduplicate(),
        EliminateDead(),
        AssignNames(),
        VerifyCanonical(),
    ]


def _canonical(model: ir.Model, folder: Path) -> ir.Model:
    PassManager(PassContext(WeightStore(folder))).run(model, _passes())
    return model


@pytest.mark.parametrize("external", [False, True])
def test_a_model_becomes_canonical(tmp_path: Path, external: bool) -> None:
    model = build(_TEXT, _WEIGHTS)
    model = _canonical(externalize(model, tmp_path) if external else model, tmp_path)
    assert stage_of(model) is Stage.CANONICAL
    assert op_types(model) == [
        *("Conv", "Relu", "GlobalAveragePool", "Squeeze", "Loop"),
        *("MatMul", "Mul", "Add", "Identity", "MatMul"),
    ]
    feeds = {**random_feeds(model, 0), "count": np.array(3)}
    assert_parity(build(_TEXT, _WEIGHTS), model, tolerance=1e-4, feeds=feeds)


def test_a_canonical_model_stays_as_it_is(tmp_path: Path) -> None:
    model = _canonical(build(_TEXT, _WEIGHTS), tmp_path)
    once = serialized(model)
    records = PassManager(PassContext(WeightStore(tmp_path))).run(model, _passes())
    assert [record.rewrites for record in records] == [()] * len(records)
    assert serialized(model) == once


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (_canonical(build(_TEXT, _WEIGHTS), tmp_path) for _ in range(2))
    assert serialized(first) == serialized(second)
