"""Whether a model is worse than the last release."""

from collections.abc import Iterator, Mapping

from qcompiler.bounds import Gate, Tolerances
from qcompiler.calibration.estimates import Estimate
from qcompiler.calibration.task_metrics import Scores, TaskMetric
from qcompiler.gate.figures import FIDELITY, OF_DISTRIBUTIONS, Figures
from qcompiler.gate.findings import judged, worse
from qcompiler.report.gate_files import number_text
from qcompiler.report.verdict import Finding

COSTS = ("size", "memory", "bits")
_RELATIVE = ("kl", "size", "memory")
_UNITS = {"size": "bytes", "memory": "bytes", "bits": "bits"}


def beside_release(
    now: Figures, then: Figures, metric: TaskMetric | None, tolerances: Tolerances
) -> Iterator[Finding]:
    """Hold outputs and metric against those of a release that was run on the same samples."""
    for name, output in now.fidelity.outputs.items():
        earlier = then.fidelity.outputs[name]
        for figure, (unit, _, estimate) in FIDELITY.items():
            if figure in OF_DISTRIBUTIONS and not output.is_distribution:
                continue
            limit = float(getattr(tolerances, figure))
            if figure in _RELATIVE:
                limit *= estimate(earlier).value
            lost = output.worsening(figure, earlier)
            yield worse(f"no worse: {figure}", name, lost, limit, unit)
    if metric is not None and now.scores is not None and then.scores is not None:
        yield _metric(metric, then.scores, now.scores, tolerances)


def _metric(metric: TaskMetric, then: Scores, now: Scores, tolerances: Tolerances) -> Finding:
    lost = metric.worsening(then, now)
    return worse("no worse: metric", metric.name, lost, tolerances.metric, metric.unit)


def against_record(
    now: Mapping[str, Estimate],
    then: Mapping[str, float],
    gate: Gate,
    release: str,
    *,
    metric_higher: bool,
) -> Iterator[Finding]:
    """Hold figures against recorded ones; figures are named "sqnr logits"."""
    for name, estimate in now.items():
        figure, _, subject = name.partition(" ")
        if name not in then or figure == "latency":
            continue
        unit = FIDELITY[figure][0] if figure in FIDELITY else _UNITS.get(figure, "")
        higher = FIDELITY[figure][1] if figure in FIDELITY else figure == "metric" and metric_higher
        limit = _allowed(figure, then[name], gate.tolerances, higher=higher)
        note = f" ({release} has {number_text(then[name], unit)})"
        bound = f"no worse: {figure}"
        yield judged(bound, subject, estimate, limit, unit, at_least=higher, note=note)


def _allowed(figure: str, then: float, tolerances: Tolerances, *, higher: bool) -> float:
    tolerance = float(getattr(tolerances, figure))
    if figure in _RELATIVE:
        tolerance *= then
    return then - tolerance if higher else then + tolerance
