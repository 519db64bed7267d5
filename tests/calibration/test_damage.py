"""Damage of single ops, against models in which everything else was left in float."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.calibration.candidates import Candidate, carry_ranges, find_candidates
from qcompiler.calibration.damage import Damage, MeasureOptions, measure_damage
from qcompiler.errors import UsageError
from qcompiler.execution.sessions import open_session
from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.provenance import SCHEME
from qcompiler.pipeline import pass_named, quantizing_passes
from qcompiler.plan import Plan
from tests.support.graphs import serialized
from tests.support.sensitive import OPS, SENSITIVE, calls, context, planned, sensitive_model

Outputs = list[dict[str, npt.NDArray[Any]]]


def options_of(plan: Plan, folder: Path) -> MeasureOptions:
    assert plan.data is not None
    passes = (pass_named("place-quantizers", plan), *quantizing_passes(plan))
    return MeasureOptions(plan.data.samples, passes, context(folder))


def outputs_of(model: ir.Model) -> Outputs:
    with open_session(model, optimize=False, threads=1) as session:
        return [session.run(feeds) for feeds in calls(4)]


def isolated(model: ir.Model, candidate: Candidate, options: MeasureOptions) -> ir.Model:
    copy = model.clone()
    carry_ranges(copy.graph)
    for node in all_nodes(copy):
        if SCHEME in node.metadata_props and node.name not in candidate.nodes:
            node.metadata_props[SCHEME] = "float"
    for rewrite in options.passes:
        rewrite.run(copy, options.context)
    return copy


def noise_of(truth: Outputs, found: Outputs, name: str) -> float:
    wanted = np.concatenate([call[name].astype(np.float64) for call in truth])
    error = np.concatenate([call[name].astype(np.float64) for call in found]) - wanted
    return float((error**2).sum() / (wanted**2).sum())


@pytest.fixture
def measured(tmp_path: Path) -> tuple[ir.Model, list[Candidate], list[Damage], MeasureOptions]:
    model, plan = planned()
    options = options_of(plan, tmp_path)
    candidates = find_candidates(model)
    before = serialized(model)
    found = measure_damage(model, candidates, lambda c: ["y", "p"], options, "test")
    assert serialized(model) == before
    return model, candidates, found, options


def test_each_op_does_what_it_does_alone_in_a_model(
    measured: tuple[ir.Model, list[Candidate], list[Damage], MeasureOptions],
) -> None:
    model, candidates, found, options = measured
    assert tuple(c.nodes[0] for c in candidates) == OPS
    truth = outputs_of(sensitive_model())
    for candidate, damage in zip(candidates, found, strict=True):
        outputs = outputs_of(isolated(model, candidate, options))
        noise = max(noise_of(truth, outputs, name) for name in ("y", "p"))
        assert damage.noise == pytest.approx(noise, rel=1e-3)
        p = np.concatenate([call["p"].astype(np.float64) for call in truth])
        q = np.concatenate([call["p"].astype(np.float64) for call in outputs])
        divergence = float((p * np.log(p / q)).sum(axis=1).mean())
        assert damage.divergence == pytest.approx(divergence, rel=0.02, abs=2e-7)


def test_the_op_that_reads_an_outlier_channel_is_the_worst(
    measured: tuple[ir.Model, list[Candidate], list[Damage], MeasureOptions],
) -> None:
    _, candidates, found, _ = measured
    noise = {c.nodes[0]: damage.noise for c, damage in zip(candidates, found, strict=True)}
    assert max(noise, key=lambda name: noise[name]) == SENSITIVE
    assert noise[SENSITIVE] > 10 * sorted(noise.values())[-2]


def test_the_result_does_not_depend_on_how_memory_divides_the_ops(
    measured: tuple[ir.Model, list[Candidate], list[Damage], MeasureOptions],
) -> None:
    model, candidates, found, options = measured
    tight = replace(options, memory_budget=4 * 30_000)
    again = measure_damage(model, candidates, lambda c: ["y", "p"], tight, "test")
    assert [d.noise for d in again] == pytest.approx([d.noise for d in found], rel=1e-6)
    with pytest.raises(UsageError, match="comparing it takes"):
        measure_damage(
            model, candidates, lambda c: ["y"], replace(options, memory_budget=40_000), "test"
        )


def test_a_place_that_does_not_depend_on_the_op_has_no_damage(tmp_path: Path) -> None:
    model, plan = planned()
    last = find_candidates(model)[-1:]
    (found,) = measure_damage(model, last, lambda c: ["y"], options_of(plan, tmp_path), "test")
    assert found == Damage(0.0)
    assert found.sqnr_db == np.inf
