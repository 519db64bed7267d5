"""Making a candidate and measuring it: accuracy on calls that chose nothing, then latency."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from math import inf, isfinite
from pathlib import Path
from typing import Final

import onnx_ir as ir

from qcompiler.artefacts import CompileResult
from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.metric import OutputBound
from qcompiler.calibration.quality import Reference
from qcompiler.compile import compile_model
from qcompiler.errors import ModelError, ParityError, TargetError
from qcompiler.execution.latency import Timing, time_models
from qcompiler.execution.measurements import Measurement, Measurements, machine_name
from qcompiler.execution.narrow_floats import has_bfloat16
from qcompiler.gate.latency_ratio import Question, judge_latency
from qcompiler.ir.load import load_model
from qcompiler.plan import Plan
from qcompiler.progress import Progress
from qcompiler.quant.qtype import qtype_of
from qcompiler.quant.scheme import parse_scheme
from qcompiler.report.records import Report
from qcompiler.report.search_points import SearchPoint
from qcompiler.search.candidates import Candidate
from qcompiler.search.request import SearchRequest

_NO_SIGNAL_DB: Final = -999.0
"""What stands in reports for outputs that are not finite."""
_ROUNDED_BITS: Final = 0.01
"""Zero points fill whole bytes, and values of islands are counted before their weights are cut."""


@dataclass(frozen=True, slots=True)
class Made:
    """A candidate that was considered.

    Attributes:
        point: What was measured.
        result: Its files; None where it was not made, or they are gone.
    """

    point: SearchPoint
    result: CompileResult | None

    @property
    def holds(self) -> bool:
        """Whether it holds every bound."""
        return self.point.outcome == "holds"


class Trials:
    """Makes candidates of one model.

    Args:
        source: The float model.
        request: What is asked for.
        bound: What must hold of the outputs, None where nothing must.
        plan: Of any candidate, with samples.
        judging: The calls that accuracy is measured on.
        feeds: The call that latency is measured on.
        measurements: The file of measurements.
        progress: Where the work is shown.
    """

    def __init__(
        self,
        source: Path,
        request: SearchRequest,
        bound: OutputBound | None,
        plan: Plan,
        judging: Samples,
        feeds: Feeds,
        measurements: Path,
        progress: Progress,
    ) -> None:
        self._source = source
        self._request = request
        self._bound = bound
        self._plan = plan
        self._feeds = feeds
        self._measurements = measurements
        self._progress = progress
        model = load_model(source)
        assert plan.calibration is not None
        self._reference = Reference(
            model,
            judging,
            memory=plan.calibration.memory_budget // 4,
            most_calls=len(judging),
            custom_op_libraries=plan.custom_op_libraries,
        )
        metric = None if bound is None else bound.metric
        libraries = plan.custom_op_libraries
        self.source_metric = None if metric is None else metric.of(model, libraries)

    @property
    def accuracy(self) -> str:
        """Which figure of a point says how accurate it is."""
        if self.source_metric is not None:
            return "metric"
        return "divergence" if self._reference.of_distributions else "sqnr_db"

    def make(self, candidate: Candidate, folder: Path, name: str) -> Made:
        """Compile a candidate into a folder of its own, measure it and hold it against the bounds.

        Raises:
            UsageError: Samples, metric or disk cannot be used.
        """
        if candidate.refusal is not None:
            return Made(_not_made(candidate, candidate.refusal), None)
        folder.mkdir()
        try:
            result = compile_model(
                self._source, candidate.options, output=folder / name, progress=self._progress
            )
        except (ModelError, ParityError, TargetError) as error:
            shutil.rmtree(folder)
            return Made(_not_made(candidate, error.message), None)
        point = self._measured(candidate, result)
        reasons = self._broken(point, result.report)
        latency = self._latency(candidate, result, wanted=not reasons)
        if latency is not None:
            point = replace(
                point,
                latency_ratio=latency.ratio,
                latency_low=latency.low,
                latency_high=latency.high,
            )
            limit = self._request.max_latency_ratio
            if limit is not None and latency.ratio > limit:
                reasons.append(f"{latency.ratio:.2f} of float's time")
        outcome = "fails" if reasons else "holds"
        return Made(replace(point, outcome=outcome, reason="; ".join(reasons)), result)

    def _measured(self, candidate: Candidate, result: CompileResult) -> SearchPoint:
        model, reference = load_model(result.path), self._reference
        found = reference.sqnr_db(model)
        diverged = -reference.nearness_each(model, [{}])[0] if reference.of_distributions else None
        score = None
        if self._bound is not None and self._bound.metric is not None:
            score = self._bound.metric.of(model, self._plan.custom_op_libraries)
        return SearchPoint(
            candidate.name,
            "",
            average_bits=round(average_bits(result.report), 4),
            bytes=result.report.output.bytes,
            sqnr_db=round(found, 4) if isfinite(found) else None if found > 0 else _NO_SIGNAL_DB,
            divergence=diverged if diverged is not None and isfinite(diverged) else None,
            metric=score,
            predicted_latency=candidate.predicted,
        )

    def _broken(self, point: SearchPoint, report: Report) -> list[str]:
        """Return which bounds on accuracy and size do not hold, in words."""
        return [*self._inaccurate(point), *self._too_large(report)]

    def _inaccurate(self, point: SearchPoint) -> Iterator[str]:
        bound = self._bound
        if bound is None:
            return
        least = bound.min_sqnr_db
        if least is not None and point.sqnr_db is not None and point.sqnr_db < least:
            yield f"{point.sqnr_db:.1f} dB"
        if point.metric is not None and self.source_metric is not None:
            wanted = self.source_metric - bound.max_drop
            if point.metric < wanted:
                yield f"metric {point.metric:.6g}, {wanted:.6g} wanted"

    def _too_large(self, report: Report) -> Iterator[str]:
        """Yield that a plan changed on the way, to float where integers lose, takes too much."""
        request = self._request
        if request.average_bits is not None:
            bits = average_bits(report)
            if bits > request.average_bits + _ROUNDED_BITS:
                yield f"{bits:.2f} bits per weight"
        if request.nbytes is not None and report.summary.weight_bytes_after > request.nbytes:
            yield f"weights of {report.summary.weight_bytes_after} B"

    def _latency(
        self, candidate: Candidate, result: CompileResult, *, wanted: bool
    ) -> Timing | None:
        """Time source and candidate in turns, or take what is known; None where that cannot be.

        What fails already is timed for the report alone, and no longer than that takes.
        """
        if not self._plan.target.runs_here or has_bfloat16(result.model()):
            return None
        limit = self._request.max_latency_ratio if wanted else None
        threads, libraries = self._plan.threads, self._plan.custom_op_libraries
        shapes = [(name, array.shape) for name, array in sorted(self._feeds.items())]
        machine = machine_name(threads)
        report = result.report
        content = (report.source.sha256, report.output.sha256, shapes, limit, machine)
        key = hashlib.sha256(repr((content, version("qcompiler"))).encode()).hexdigest()
        measurements = Measurements(self._measurements)
        known = measurements.get(key)
        if known is not None and "compiled" in known.timings:
            return known.timings["compiled"]
        models: list[Path | ir.Model] = [self._source, result.path]
        measure = partial(
            time_models, models, self._feeds, threads=threads, custom_op_libraries=libraries
        )
        with self._progress.task("measuring latency", 1) as advance:
            (answer,) = judge_latency([Question(0, 1, inf if limit is None else limit)], measure)
            advance(1)
        what = f"{report.source.name}: {candidate.name}"
        measurements.put(key, Measurement(what, machine, {"compiled": answer.timing}))
        measurements.save()
        return answer.timing


def _not_made(candidate: Candidate, reason: str) -> SearchPoint:
    return SearchPoint(candidate.name, "not made", reason, predicted_latency=candidate.predicted)


def average_bits(report: Report) -> float:
    """Return the bits per weight over all weights, islands included, codes at their own bits."""
    distinct = {node.weight: node for node in report.nodes if node.weight is not None}
    elements = sum(node.elements for node in distinct.values())
    bits = 0
    for node in distinct.values():
        scheme = parse_scheme(node.scheme) if node.quantized else None
        bits += 8 * node.bytes_after
        if scheme is not None:
            qtype = qtype_of(scheme.weight_bits, signed=True)
            bits -= (qtype.storage_bits - qtype.bits) * node.elements
    return bits / elements if elements else 0.0
