"""Every bound of a gate, held against what was measured."""

from collections.abc import Iterator, Mapping, Sequence

from qcompiler.calibration.estimates import Estimate
from qcompiler.calibration.fidelity import Fidelity
from qcompiler.calibration.input_statistics import InputShift
from qcompiler.calibration.task_metrics import Scores
from qcompiler.errors import UsageError
from qcompiler.gate.costs import MAX_LATENCY, NO_SLOWER, Costs
from qcompiler.gate.figures import FIDELITY, OF_DISTRIBUTIONS, Figures
from qcompiler.gate.findings import (
    exact,
    judged,
    latency_finding,
    size_limit,
    skipped,
)
from qcompiler.gate.no_worse import COSTS, against_record, beside_release
from qcompiler.gate.setting import Setting
from qcompiler.quant.selector import nearest
from qcompiler.report.verdict import Finding

FIGURES_OF = {
    "min_sqnr": "sqnr",
    "min_cosine": "cosine",
    "max_kl": "kl",
    "min_agreement": "agreement",
}
"""The figure that a bound on outputs speaks of."""


def output_findings(setting: Setting, fidelity: Fidelity) -> Iterator[Finding]:
    """Judge the bounds on outputs.

    Raises:
        UsageError: A bound names an output that does not exist, or asks of no output what only
            distributions have.
    """
    for name, _ in setting.gate.named:
        if name not in fidelity.outputs:
            close = ", ".join(nearest(name, list(fidelity.outputs)) or fidelity.outputs)
            message = f"the model has no float output {name!r}"
            raise UsageError(message, where="gate", hint=f"nearest: {close or 'none'}")
    for bound, figure in FIGURES_OF.items():
        unit, at_least, estimate = FIDELITY[figure]
        judged_outputs = 0
        for name, output in fidelity.outputs.items():
            limit = getattr(setting.gate.of_output(name), bound)
            own = getattr(dict(setting.gate.named).get(name), bound, None) is not None
            if limit is None or not (
                figure not in OF_DISTRIBUTIONS or output.is_distribution or own
            ):
                continue
            judged_outputs += 1
            yield judged(bound, name, estimate(output), limit, unit, at_least=at_least)
        if getattr(setting.gate.outputs, bound) is not None and not judged_outputs:
            raise _nothing_to_judge(bound, fidelity)


def _nothing_to_judge(bound: str, fidelity: Fidelity) -> UsageError:
    if not fidelity.outputs:
        return UsageError(f"{bound}: no output holds floats", where="gate")
    message = f"{bound} needs an output that is known to be a distribution, and none is"
    return UsageError(message, where="gate", hint=f"name one: output.NAME.{bound}=...")


def task_findings(setting: Setting, base: Scores | None, now: Scores | None) -> Iterator[Finding]:
    """Judge the bounds on the task's metric."""
    metric, gate = setting.metric, setting.gate
    if metric is None or base is None or now is None:
        return
    before, after = metric.estimate(base), metric.estimate(now)
    if gate.max_metric_drop is not None:
        note = f" ({metric.name} {before.value:.4g} -> {after.value:.4g})"
        worse = metric.worsening(base, now)
        limit = gate.max_metric_drop
        yield judged(
            "max_metric_drop", metric.name, worse, limit, metric.unit, at_least=False, note=note
        )
    if gate.metric_bound is not None:
        better = metric.higher_is_better
        limit = gate.metric_bound
        yield judged("metric_bound", metric.name, after, limit, metric.unit, at_least=better)


def cost_findings(setting: Setting, costs: Costs, now: Mapping[str, Estimate]) -> Iterator[Finding]:
    """Judge the bounds on latency, size, memory and bits.

    Raises:
        UsageError: Average bits of a model that this compiler did not make.
    """
    gate = setting.gate
    if MAX_LATENCY in costs.answers:
        answer, limit = costs.answers[MAX_LATENCY], costs.limits[MAX_LATENCY]
        yield latency_finding(MAX_LATENCY, answer, limit, "the float model", costs.inputs)
    if gate.max_size is not None:
        limit = size_limit(gate.max_size, setting.base.facts.bytes)
        yield judged("max_size", "", now["size"], limit, "bytes", at_least=False)
    if gate.max_memory is not None:
        limit = size_limit(gate.max_memory, costs.memory_of(setting.base))
        yield judged("max_memory", "", now["memory"], limit, "bytes", at_least=False)
    if gate.max_bits is not None:
        if "bits" not in now:
            message = "how many bits its weights have is not written on this model"
            hint = "only models of this compiler say so; max-size bounds the file of any model"
            raise UsageError(message, where=str(setting.candidate.path), hint=hint)
        yield judged("max_bits", "", now["bits"], gate.max_bits, "bits", at_least=False)


def input_findings(setting: Setting, shifts: Sequence[InputShift]) -> Iterator[Finding]:
    """Judge how far the inputs are from those of calibration."""
    limit = setting.gate.max_input_shift
    if limit is None:
        return
    if not shifts:
        reason = "the candidate's manifest does not say what it was calibrated on"
        yield skipped("max_input_shift", "", reason)
    for shift in shifts:
        # A difference that chance explains is none.
        found = exact(shift.shift if shift.sure else 0.0)
        note = f"; {shift.reason}"
        unit = "sd"
        yield judged("max_input_shift", shift.name, found, limit, unit, at_least=False, note=note)


def release_findings(
    setting: Setting,
    figures: Sequence[Figures],
    costs: Costs,
    now: Mapping[str, Estimate],
    then: Mapping[str, float],
) -> Iterator[Finding]:
    """Judge whether the model is worse than the last release.

    Args:
        setting: The gate.
        figures: Of the model, and of the release if it was run.
        costs: What both cost.
        now: Figures of the model by name.
        then: Figures of the release, as far as they can be compared.
    """
    gate, metric = setting.gate, setting.metric
    if gate.baseline is None:
        return
    name = setting.recorded.name if setting.recorded else "the release"
    if setting.released is not None:
        name = setting.released.facts.name
        yield from beside_release(figures[0], figures[1], metric, gate.tolerances)
        then = {figure: value for figure, value in then.items() if figure in COSTS}
    higher = metric is not None and metric.higher_is_better
    yield from against_record(now, then, gate, name, metric_higher=higher)
    if NO_SLOWER in costs.answers:
        reference = name if setting.released else "the float model"
        answer, limit = costs.answers[NO_SLOWER], costs.limits[NO_SLOWER]
        yield latency_finding(NO_SLOWER, answer, limit, reference, costs.inputs)
    if setting.released is None and not any(figure.startswith("sqnr ") for figure in then):
        reason = (
            f"outputs of {name} cannot be compared: its file is not beside its manifest, and what "
            "was recorded is of other samples or of another float model, or nothing"
        )
        yield skipped("no worse: outputs", "", reason)


def figures_of(
    setting: Setting, figures: Figures, bits: float | None, size: int, memory: int | None
) -> Iterator[tuple[str, Estimate]]:
    """Yield all figures of a model by name: "sqnr logits", "metric top1", "size"."""
    asked = [
        (FIGURES_OF[key], name)
        for name, bounds in setting.gate.named
        for key in FIGURES_OF
        if getattr(bounds, key) is not None
    ]
    for name, output in figures.fidelity.outputs.items():
        for figure, (_, _, estimate) in FIDELITY.items():
            fits = figure not in OF_DISTRIBUTIONS or output.is_distribution
            if fits or (figure, name) in asked:
                yield f"{figure} {name}", estimate(output)
    if setting.metric is not None and figures.scores is not None:
        yield f"metric {setting.metric.name}", setting.metric.estimate(figures.scores)
    yield "size", exact(float(size))
    if memory is not None:
        yield "memory", exact(float(memory))
    if bits:
        yield "bits", exact(bits)
