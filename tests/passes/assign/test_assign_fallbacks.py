"""Leaving sensitive ops out of w8a8 until the outputs are good enough."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.held_out import hold_out
from qcompiler.calibration.metric import Metric, OutputBound, Run
from qcompiler.calibration.quality import Reference
from qcompiler.errors import ParityError, UsageError
from qcompiler.ir.provenance import PAIR_LIMIT, PLACEMENT, RANGE, REASON, SCHEME
from qcompiler.passes.assign.assign_fallbacks import AssignFallbacks, FallbackOptions
from qcompiler.pipeline import pass_named, quantizing_passes
from qcompiler.plan import Plan
from qcompiler.rewriting.base import PassResult
from tests.support.graphs import node_named, op_types, serialized
from tests.support.rewrites import run_pass
from tests.support.sensitive import OPS, SENSITIVE, calls, context, planned, sensitive_model


def fallbacks(plan: Plan, bound: OutputBound) -> AssignFallbacks:
    assert plan.data is not None
    return AssignFallbacks(
        FallbackOptions(
            bound,
            plan.data.samples,
            plan.target,
            pass_named("place-quantizers", plan),
            tuple(quantizing_passes(plan)),
            (pass_named("lower-dynamic-quantization", plan),),
        )
    )


def bounded(folder: Path, bound: OutputBound) -> tuple[ir.Model, Plan, PassResult]:
    model, plan = planned()
    return model, plan, run_pass(fallbacks(plan, bound), model, folder)


def held_out_db(model: ir.Model, plan: Plan, folder: Path) -> float:
    """Quantize the plan that is written on a model, and judge it on the held-out call."""
    copy = model.clone()
    for rewrite in quantizing_passes(plan):
        rewrite.run(copy, context(folder))
    _, judging = hold_out(calls(4))
    return Reference(sensitive_model(), judging, memory=1 << 20, most_calls=1).sqnr_db(copy)


def left_out(model: ir.Model) -> list[str]:
    return [name for name in OPS if not node_named(model, name).metadata_props.get(PLACEMENT)]


def test_the_op_that_costs_most_falls_back(tmp_path: Path) -> None:
    before, plan = planned()
    assert held_out_db(before, plan, tmp_path) < 25
    model, plan, result = bounded(tmp_path, OutputBound(25.0))
    assert left_out(model) == [SENSITIVE]
    facts = node_named(model, SENSITIVE).metadata_props
    assert facts[SCHEME].startswith("w8a16")
    assert PAIR_LIMIT not in facts
    assert facts[REASON].startswith("left out of w8a8 by --min-output-sqnr 25: alone it leaves ")
    assert held_out_db(model, plan, tmp_path) >= 25
    assert [rewrite.node for rewrite in result.rewrites] == ["", SENSITIVE]
    assert "1 of 4 ops" in result.rewrites[0].detail
    assert op_types(model) == op_types(sensitive_model())


def test_what_the_op_read_is_not_quantized_any_more(tmp_path: Path) -> None:
    model, _, _ = bounded(tmp_path, OutputBound(25.0))
    (data, _) = node_named(model, SENSITIVE).inputs
    assert data is not None
    assert RANGE not in data.metadata_props


def test_a_higher_bound_leaves_more_out(tmp_path: Path) -> None:
    model, plan, _ = bounded(tmp_path, OutputBound(32.5))
    assert SENSITIVE in left_out(model)
    assert len(left_out(model)) > 1
    assert held_out_db(model, plan, tmp_path) >= 32.5


def test_a_bound_that_holds_changes_nothing(tmp_path: Path) -> None:
    untouched, _ = planned()
    model, _, result = bounded(tmp_path, OutputBound(-5.0))
    assert serialized(model) == serialized(untouched)
    assert [rewrite.rule for rewrite in result.rewrites] == ["bound-holds"]


def test_a_bound_out_of_reach_says_how_far_it_got(tmp_path: Path) -> None:
    model, plan = planned()
    before = serialized(model)
    with pytest.raises(ParityError, match=r"all 4 ops in w8a8 give -\d.* still have \d") as error:
        run_pass(fallbacks(plan, OutputBound(150.0)), model, tmp_path)
    assert error.value.exit_code == 5
    assert serialized(model) == before


def test_the_choice_is_the_same_each_time_and_stays(tmp_path: Path) -> None:
    one, plan, _ = bounded(tmp_path, OutputBound(25.0))
    other, _, _ = bounded(tmp_path, OutputBound(25.0))
    assert serialized(one) == serialized(other)
    again = run_pass(fallbacks(plan, OutputBound(25.0)), one, tmp_path)
    assert [rewrite.rule for rewrite in again.rewrites] == ["bound-holds"]
    assert serialized(one) == serialized(other)


def test_an_op_on_dynamic_activations_can_fall_back(tmp_path: Path) -> None:
    model, plan = planned()
    node = node_named(model, SENSITIVE)
    node.metadata_props[SCHEME] = "w8a8-dynamic:sym"
    pass_named("place-quantizers", plan).run(model, context(tmp_path))
    assert PLACEMENT not in node.metadata_props
    result = run_pass(fallbacks(plan, OutputBound(25.0)), model, tmp_path)
    assert node.metadata_props[SCHEME].startswith("w8a16")
    assert SENSITIVE in [rewrite.node for rewrite in result.rewrites]


def closeness(run: Run) -> float:
    """Minus the largest deviation from the float model on one call."""
    feeds = next(iter(calls(1)))
    truth = run_float(feeds)
    return -float(np.abs(run(feeds)["y"] - truth).max())


def run_float(feeds: dict[str, Any]) -> Any:
    from qcompiler.execution.sessions import open_session

    with open_session(sensitive_model(), optimize=False, threads=1) as session:
        return session.run(feeds)["y"]


def test_a_metric_of_the_users_bounds_too(tmp_path: Path) -> None:
    model, plan = planned()
    alone, _, _ = bounded(tmp_path, OutputBound(25.0))
    wanted = -_metric_of(alone, plan, tmp_path, closeness)
    bound = OutputBound(None, Metric("m:closeness", closeness), wanted * 1.01)
    run_pass(fallbacks(plan, bound), model, tmp_path)
    assert left_out(model) == [SENSITIVE]
    assert "--max-metric-drop" in node_named(model, SENSITIVE).metadata_props[REASON]


def _metric_of(
    model: ir.Model, plan: Plan, folder: Path, function: Callable[[Run], float]
) -> float:
    copy = model.clone()
    for rewrite in quantizing_passes(plan):
        rewrite.run(copy, context(folder))
    return Metric("m:f", function).of(copy)


def test_a_bound_needs_calibrated_activations() -> None:
    with pytest.raises(UsageError, match="keep calibrated activations"):
        planned(scheme="w8a16", min_output_sqnr=20.0)
