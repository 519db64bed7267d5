"""Nodes are counted around every pass, and those that disappear are named."""

from pathlib import Path

from qcompiler.ir.weights import WeightStore
from qcompiler.passes.canonicalize.assign_names import AssignNames
from qcompiler.passes.canonicalize.eliminate_identity import EliminateIdentity
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.graph_changes import CountGraphChanges, GraphChange
from qcompiler.rewriting.manager import PassManager
from tests.support.graphs import build


def test_what_a_pass_takes_away_is_counted_and_named(tmp_path: Path) -> None:
    model = build(
        "g (float[2] x) => (float[2] y)"
        " { [keep] a = Relu(x) [drop] b = Identity(a) [end] y = Relu(b) }"
    )
    hook = CountGraphChanges()
    with WeightStore(tmp_path) as store:
        PassManager(PassContext(store), [hook]).run(model, [EliminateIdentity(), AssignNames()])
    assert hook.changes == [
        GraphChange(2, {"Identity": -1}, ("drop",)),
        GraphChange(2, {}, ()),
    ]
