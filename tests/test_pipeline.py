"""Which passes a plan leads to, in which order."""

from dataclasses import replace

import pytest

from qcompiler.pipeline import PASSES, CompileOptions, make_plan, pipeline
from qcompiler.rewriting.stages import Stage
from qcompiler.rewriting.user_pass import RunUserPass
from qcompiler.targets.registry import TARGETS


def names(options: CompileOptions) -> list[str]:
    return [rewrite.name for rewrite in pipeline(make_plan(options))]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_lowers_by_its_own_list(target: str) -> None:
    found = names(CompileOptions(target=target))
    after = found[found.index("insert-qdq") + 1 :]
    assert after == [*TARGETS[target].lowering, "verify-target"]


def test_the_order_is_the_target_s() -> None:
    plan = make_plan(CompileOptions())
    chosen = ("decode-at-load", "decompose-gemm")
    passes = pipeline(replace(plan, target=replace(plan.target, lowering=chosen)))
    assert tuple(rewrite.name for rewrite in passes[-3:]) == (*chosen, "verify-target")


def test_stages_follow_each_other() -> None:
    reached = Stage.IMPORTED
    for rewrite in pipeline(make_plan(CompileOptions())):
        assert rewrite.consumes.rank <= reached.rank, rewrite.name
        reached = max(reached, rewrite.produces, key=lambda stage: stage.rank)
    assert reached is Stage.LOWERED


def test_a_user_s_model_becomes_canonical_again() -> None:
    found = names(CompileOptions(user_passes=("tests.support.user_passes:keep",)))
    at = found.index(RunUserPass.name)
    assert found[at - 1] == "verify-canonical"
    assert found[at + 1 : found.index("assign-schemes")] == [
        *("lift-constants", "fold-constants", "deduplicate"),
        *("eliminate-dead", "assign-names", "verify-canonical"),
    ]


@pytest.mark.parametrize(
    ("scheme", "opset"),
    [("float", 21), ("w8a16", 21), ("w3a16:b128", 21), ("w7a8-dynamic", 21), ("w2a16:b64", 25)],
)
def test_opset_of_a_scheme(scheme: str, opset: int) -> None:
    assert make_plan(CompileOptions(scheme=scheme)).opset == opset


def test_every_pass_is_in_the_table() -> None:
    assert set(names(CompileOptions())) <= set(PASSES)
