"""Judging a model by a gate, top to bottom: open, measure, judge, look for causes."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

import onnx_ir as ir

from qcompiler.bounds import Gate
from qcompiler.calibration.calls import Samples, counted
from qcompiler.calibration.estimates import Estimate
from qcompiler.calibration.input_statistics import InputShift, input_shift
from qcompiler.calibration.samples import open_samples
from qcompiler.calibration.task_metrics import TaskMetric, find_task_metric
from qcompiler.errors import UsageError
from qcompiler.gate.costs import MAX_LATENCY, Costs, measure_costs, refuse_costs
from qcompiler.gate.figures import Figures, measure_outputs
from qcompiler.gate.judge import (
    cost_findings,
    figures_of,
    input_findings,
    output_findings,
    release_findings,
    task_findings,
)
from qcompiler.gate.release import open_release
from qcompiler.gate.setting import Candidate, GateOptions, Opened, Setting, candidate_at, opened
from qcompiler.gate.suspects import Evidence, find_suspects
from qcompiler.progress import Progress, SilentProgress
from qcompiler.report.build import node_reports, summarize
from qcompiler.report.verdict import Finding, Status, Suspect, Verdict

_COSTS = ("max_latency", "max_size", "max_memory", "max_bits")
_COSTS_SINCE = tuple(f"no worse: {cost}" for cost in ("latency", "size", "memory", "bits"))
_FEW = 30


def run_gate(
    base: Path,
    candidate: Candidate | Path,
    gate: Gate,
    options: GateOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Verdict:
    """Judge a model.

    Args:
        base: The float model.
        candidate: The model made of it; a path is read with the manifest beside it, if any.
        gate: What it must keep.
        options: How that is measured.
        progress: Where long work shows how far it is; None is silent.

    Raises:
        UsageError: The gate asks for nothing or for what cannot be judged, or data is missing.
        ModelError: A model is malformed, or the two do not fit together.
        TargetError: ONNX Runtime cannot run one of them.
    """
    if isinstance(candidate, Path):
        candidate = candidate_at(candidate)
    setting = _open(base, candidate, gate, options or GateOptions(), progress or SilentProgress())
    base_scores, figures = measure_outputs(setting)
    costs = measure_costs(setting)
    now = _figures(setting, setting.candidate, figures[0], costs)
    if MAX_LATENCY in costs.answers:
        timing = costs.answers[MAX_LATENCY].timing
        now["latency"] = Estimate(timing.ratio, timing.low, timing.high)
    shifts = _shifts(setting, candidate)
    findings = (
        *output_findings(setting, figures[0].fidelity),
        *task_findings(setting, base_scores, figures[0].scores),
        *cost_findings(setting, costs, now),
        *input_findings(setting, shifts),
        *release_findings(setting, figures, costs, now, _then(setting, figures, costs)),
    )
    suspects = _suspects(setting, candidate, findings, shifts)
    return _verdict(setting, findings, suspects, now, _warnings(setting, candidate, now))


def _verdict(
    setting: Setting,
    findings: tuple[Finding, ...],
    suspects: tuple[Suspect, ...],
    now: Mapping[str, Estimate],
    warnings: tuple[str, ...],
) -> Verdict:
    return Verdict(
        setting.base.facts,
        setting.candidate.facts,
        setting.samples.origin,
        setting.samples.fingerprint(),
        max((entry.samples for entry in now.values()), default=0),
        findings,
        suspects,
        {name: _finite(entry.value) for name, entry in now.items()},
        warnings,
    )


def require_judgeable(gate: Gate, model: ir.Model, options: GateOptions) -> None:
    """Look up all that a gate names, before there is a result it could judge.

    Raises:
        UsageError: It asks for nothing, or data, metric or release cannot be used.
    """
    if not gate.asks_for_something:
        message = "no bound was given, so there is nothing that could fail"
        hint = "for example --gate min-sqnr=20 --gate max-latency=0.9; docs/ci.md lists them"
        raise UsageError(message, where="gate", hint=hint)
    if gate.data is None:
        message = "there is no data to judge on"
        raise UsageError(message, where="gate", hint="give --data DATA, or data in the recipe")
    if gate.baseline is not None:
        open_release(Path(gate.baseline))
    if not options.native:
        refuse_costs(gate, "the target's own runtime is going to run the model")
    _open_data(gate, model, options)


def _open_data(
    gate: Gate, model: ir.Model, options: GateOptions
) -> tuple[TaskMetric | None, Samples]:
    assert gate.data is not None
    metric = None if gate.metric is None else find_task_metric(gate.metric, gate.labels)
    needs_label = metric is not None and metric.label is not None
    return metric, open_samples(
        gate.data, model, options.samples, label=gate.labels, needs_label=needs_label
    )


def _open(
    base: Path, candidate: Candidate, gate: Gate, options: GateOptions, progress: Progress
) -> Setting:
    float_model = opened(base, base.name)
    require_judgeable(gate, float_model.model, options)
    metric, samples = _open_data(gate, float_model.model, options)
    release = None if gate.baseline is None else open_release(Path(gate.baseline))
    released = None
    if release is not None and release.path is not None:
        released = opened(release.path, release.name)
    return Setting(
        float_model,
        opened(candidate.path, candidate.name),
        released,
        release.recorded if release is not None and released is None else None,
        gate,
        options,
        metric,
        samples,
        progress,
    )


def _figures(
    setting: Setting, model: Opened, figures: Figures, costs: Costs
) -> dict[str, Estimate]:
    bits = summarize(node_reports(model.model, None), seconds=0.0).average_bits_all
    size, memory = model.facts.bytes, costs.memory_of(model)
    return dict(figures_of(setting, figures, bits, size, memory))


def _then(setting: Setting, figures: Sequence[Figures], costs: Costs) -> Mapping[str, float]:
    """Return the figures of the last release, as far as they can be compared."""
    if setting.released is not None:
        found = _figures(setting, setting.released, figures[1], costs)
        return {name: entry.value for name, entry in found.items()}
    if setting.recorded is None:
        return {}
    entry = setting.recorded
    same_data = entry.data_sha256 == setting.samples.fingerprint()
    same_base = entry.base_sha256 == setting.base.facts.sha256
    return {
        name: float("inf") if value is None else value
        for name, value in entry.measured.items()
        if name in ("size", "memory", "bits")
        or (same_data and (same_base or name.startswith("metric ")))
    }


def _shifts(setting: Setting, candidate: Candidate) -> tuple[InputShift, ...]:
    here = setting.samples.input_statistics()
    return tuple(
        input_shift(name, then, here[name])
        for name, then in candidate.calibrated.items()
        if name in here
    )


def _suspects(
    setting: Setting,
    candidate: Candidate,
    findings: Sequence[Finding],
    shifts: tuple[InputShift, ...],
) -> tuple[Suspect, ...]:
    """Look for causes where accuracy failed; what costs too much needs none."""
    failed = {f.bound for f in findings if f.status is Status.FAILED}
    if not failed - {*_COSTS, *_COSTS_SINCE}:
        return ()
    changed = candidate.sha256 not in (None, setting.candidate.facts.sha256)
    return find_suspects(
        setting.base.model,
        setting.candidate.model,
        setting.samples,
        Evidence(changed, shifts),
        custom_op_libraries=setting.options.custom_op_libraries,
        progress=setting.progress,
    )


def _warnings(
    setting: Setting, candidate: Candidate, now: Mapping[str, Estimate]
) -> tuple[str, ...]:
    found = []
    if candidate.calibration_sha256 == setting.samples.fingerprint():
        found.append("judged on the samples it was calibrated on: others will come out worse")
    if setting.samples.made_up:
        found.append("judged on made-up random inputs, which says nothing about real data")
    counts = [entry.samples for entry in now.values() if entry.samples]
    if counts and max(counts) < _FEW:
        found.append(
            f"{counted(max(counts), 'sample')}: too few for any figure of accuracy to be certain"
        )
    return tuple(found)


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
