"""Makes a report from the finished graph and what the passes recorded."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.calls import warnings as sample_warnings
from qcompiler.calibration.error_growth import NodeError
from qcompiler.calibration.numerics import NumericsRecord
from qcompiler.calibration.quality import OutputQuality
from qcompiler.execution.kernels import Kernel
from qcompiler.execution.latency import Timing
from qcompiler.execution.process_memory import peak_memory
from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.provenance import COMPUTE_TYPE, METRIC, OBSERVER, facts_of, origins_of
from qcompiler.report.compute_types import TypeCounts, compute_type_of
from qcompiler.report.records import (
    CalibrationReport,
    ChangeReport,
    MetricReport,
    NodeReport,
    OutputCheck,
    PassReport,
    QualityReport,
    SkipReport,
    Summary,
    WindowReport,
)
from qcompiler.rewriting.base import PassRecord
from qcompiler.rewriting.graph_changes import GraphChange
from qcompiler.rewriting.window_record import WindowRewrite

_MERGED = "not found: the runtime merged or removed the op"
_NAMES_SHOWN = 4
_KERNEL_LOSS_DB = 1.0
_STAYS_IN_FLOAT = "stays-in-float"
"""The rule of ops between quantized values that have no weight to give a scheme to."""
_STAYS_IN_FLOAT32 = "cast-types"
"""The rule of ops of which nothing else was decided; `type_reason` says why."""
_NO_ERROR = NodeError(None, None)


def node_reports(
    model: ir.Model,
    kernels: Mapping[str, Kernel] | None,
    errors: Mapping[str, NodeError] | None = None,
) -> tuple[NodeReport, ...]:
    """Read what was decided from the nodes' metadata.

    Args:
        model: The compiled model.
        kernels: What the runtime runs, by node name; None if nobody looked.
        errors: How far data and results are from the float model's, by its node names.
    """
    known = errors or {}
    found: list[NodeReport] = []
    compute = model.metadata_props.get(COMPUTE_TYPE)
    for node in all_nodes(model):
        facts = facts_of(node)
        if not facts.keys() & {"scheme", "placement", "placement_reason", "type_reason"}:
            continue
        scheme = facts.get("scheme", "float")
        if scheme == "float" and "placement" in facts:
            # An op without weights, of which assign-schemes knew no more than that.
            scheme = "a8"
            facts = {**facts, "rule": facts["placement"], "reason": facts["placement_reason"]}
        kernel = None if kernels is None else kernels.get(node.name or "")
        looked_for = kernels is not None and scheme not in ("float", "a8")
        missing = _MERGED if looked_for else None
        before = int(facts.get("weight_bytes_before", 0))
        names = (node.name or "", *origins_of(node))
        error = next((known[name] for name in names if name in known), _NO_ERROR)
        found.append(
            NodeReport(
                name=_source_name(node),
                origins=origins_of(node),
                op_type=facts.get("origin_op", node.op_type),
                scheme=scheme,
                rule=facts.get("rule") or _rule_without_weights(facts),
                reason=facts.get("reason") or facts.get("placement_reason", ""),
                placement=facts.get("placement"),
                equalized=facts.get("equalized"),
                region=int(facts["region"]) if "region" in facts else None,
                float_ms=_number(facts.get("float_ms")),
                quantized_ms=_number(facts.get("quantized_ms")),
                weight=facts.get("weight"),
                elements=int(facts.get("weight_elements", 0)),
                bytes_before=before,
                bytes_after=int(facts.get("weight_bytes_after", before))
                + int(facts.get("island_bytes", 0)),
                sqnr_db=_finite(float(facts.get("weight_sqnr_db", math.inf))),
                kernel=kernel.name if kernel else missing,
                integer_kernel=kernel.integer if kernel else None,
                compute_type=compute_type_of(node, compute),
                type_reason=facts.get("type_reason"),
                data_sqnr_db=_decibels_or_none(error.data_db),
                output_sqnr_db=_decibels_or_none(error.output_db),
                sensitivity_db=_number(facts.get("sensitivity_db")),
            )
        )
    return tuple(found)


def _rule_without_weights(facts: Mapping[str, str]) -> str:
    return _STAYS_IN_FLOAT if "placement_reason" in facts else _STAYS_IN_FLOAT32


def calibration_report(
    model: ir.Model, samples: Samples, quality: Sequence[OutputQuality]
) -> CalibrationReport:
    """Say what the ranges of activations come from, and how near the outputs stayed."""
    return CalibrationReport(
        source=samples.origin,
        calls=len(samples),
        sha256=samples.fingerprint(),
        made_up=samples.made_up,
        observer=model.metadata_props.get(OBSERVER, ""),
        outputs=tuple(
            QualityReport(
                entry.name,
                None if entry.native_db is None else _decibels(entry.native_db),
                _decibels(entry.emulated_db),
                entry.native_db is not None,
            )
            for entry in quality
        ),
    )


def calibration_warnings(samples: Samples, quality: Sequence[OutputQuality]) -> tuple[str, ...]:
    """Say what makes the calibration doubtful."""
    found = []
    if samples.made_up:
        found.append(
            "calibrated on made-up random inputs: ranges, and every accuracy figure here, mean "
            "nothing for real data"
        )
    found += sample_warnings(samples)
    for entry in quality:
        native = entry.emulated_db if entry.native_db is None else entry.native_db
        lost = entry.emulated_db - native
        if lost > _KERNEL_LOSS_DB:
            found.append(
                f"output {entry.name} is {lost:.1f} dB further from float with the kernels of "
                "this CPU than the quantized graph says: a kernel saturates or rounds differently"
            )
    return tuple(found)


def metric_report(model: ir.Model) -> MetricReport | None:
    """Read what a metric of the user's gave, if there was one."""
    text = model.metadata_props.get(METRIC)
    return None if text is None else MetricReport(**json.loads(text))


def latency_warnings(latency: Sequence[Timing]) -> tuple[str, ...]:
    """Say when the result is slower than its source.

    Args:
        latency: Timings of source and result; empty if nobody measured.
    """
    if not latency or round(latency[1].ratio, 2) <= 1:
        return ()
    source, result = latency
    return (
        f"SLOWER THAN FLOAT: the compiled model takes {result.ratio:.2f} times as long as the "
        f"source, {source.milliseconds:.2f} -> {result.milliseconds:.2f} ms on the largest sample "
        f"(between {result.low:.2f} and {result.high:.2f} times in 19 of 20 cases); measure on an "
        "idle machine, or keep the model in float",
    )


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def _decibels_or_none(value: float | None) -> float | None:
    return None if value is None else _decibels(value)


def _decibels(value: float) -> float | None:
    return _finite(round(value, 2))


def _source_name(node: ir.Node) -> str:
    """Return what the source model called a node; one that absorbed others keeps its own name."""
    origins = origins_of(node)
    return node.name if node.name in origins else next(iter(origins), node.name or "")


def _finite(value: float) -> float | None:
    """Return a number that JSON can hold; None stands for an infinite one."""
    return value if math.isfinite(value) else None


def kernel_warnings(nodes: Sequence[NodeReport]) -> tuple[str, ...]:
    """Say which quantized ops get no integer kernel, one sentence a kernel."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for node in nodes:
        if node.quantized and node.integer_kernel is False:
            groups.setdefault((node.scheme, node.kernel), []).append(node.name)
    found: list[str] = []
    for (scheme, kernel), names in groups.items():
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
        found.append(
            f"{len(names)} ops stored in {scheme} get no integer kernel, only the smaller file: "
            f"{kernel} ({shown})"
        )
    lost = [node.name for node in nodes if node.quantized and node.kernel == _MERGED]
    if lost:
        text = ", ".join(lost[:_NAMES_SHOWN]) + (", ..." if len(lost) > _NAMES_SHOWN else "")
        found.append(f"{len(lost)} quantized ops were not found in the runtime's graph ({text})")
    return tuple(found)


def pass_reports(
    records: Sequence[PassRecord], changes: Sequence[GraphChange]
) -> tuple[PassReport, ...]:
    """Turn the manager's records, and what happened to the graph, into the report's.

    Args:
        records: One a pass.
        changes: Of the last of them; the others ran before a stopped compilation went on.
    """
    seen = [*[None] * (len(records) - len(changes)), *changes]
    return tuple(
        PassReport(
            record.name,
            record.stage,
            record.numerics,
            round(record.seconds, 3),
            len(record.rewrites),
            tuple(SkipReport(skip.rule, skip.node, skip.reason) for skip in record.skips),
            _changes(record),
            change.nodes if change else None,
            change.ops if change else {},
            change.removed if change else (),
        )
        for record, change in zip(records, seen, strict=True)
    )


def window_reports(records: Iterable[PassRecord]) -> tuple[WindowReport, ...]:
    """Return what became of windows, in order."""
    rewrites = [rewrite for record in records for rewrite in record.rewrites]
    return tuple(
        WindowReport(
            window.node,
            _finite(window.loss_before),
            _finite(window.loss_after),
            window.kept,
            window.codes,
            window.flipped,
            round(window.seconds, 3),
            window.peak_bytes,
        )
        for window in rewrites
        if isinstance(window, WindowRewrite)
    )


def _changes(record: PassRecord) -> tuple[ChangeReport, ...]:
    """Put together what was done in the same way."""
    groups: dict[tuple[str, str], list[str]] = {}
    for rewrite in record.rewrites:
        groups.setdefault((rewrite.rule, rewrite.detail), []).append(rewrite.node)
    return tuple(ChangeReport(*key, tuple(nodes)) for key, nodes in groups.items())


def output_checks(records: Iterable[NumericsRecord]) -> tuple[OutputCheck, ...]:
    """Turn numeric comparisons into the report's; an unchanged output has no SQNR."""
    return tuple(
        OutputCheck(
            record.name,
            record.output,
            _finite(record.max_abs),
            _finite(record.max_rel),
            _finite(round(record.sqnr_db, 2)),
        )
        for record in records
    )


def summarize(
    nodes: Sequence[NodeReport],
    latency: Sequence[Timing] = (),
    types: TypeCounts | None = None,
    *,
    seconds: float,
) -> Summary:
    """Total the nodes; weights that several nodes share are counted once."""
    with_weight = [node for node in nodes if node.weight is not None]
    distinct = list({node.weight: node for node in reversed(with_weight)}.values())
    quantized = [node for node in distinct if node.quantized]
    qualities = [node.sqnr_db for node in quantized if node.sqnr_db is not None]
    types = types or TypeCounts()
    looked_at = [n for n in with_weight if n.quantized and n.integer_kernel is not None]
    return Summary(
        sites=len(with_weight),
        quantized=sum(1 for node in with_weight if node.quantized),
        weight_bytes_before=sum(node.bytes_before for node in distinct),
        weight_bytes_after=sum(node.bytes_after for node in distinct),
        average_bits=_bits(quantized),
        average_bits_all=_bits(distinct),
        worst_sqnr_db=min(qualities, default=None),
        integer_kernels=sum(1 for n in looked_at if n.integer_kernel) if looked_at else None,
        peak_memory_bytes=peak_memory(),
        seconds=round(seconds, 3),
        float_ms=latency[0].milliseconds if latency else None,
        compiled_ms=latency[1].milliseconds if latency else None,
        latency_ratio=latency[1].ratio if latency else None,
        compute_type=types.compute_type,
        narrow_ops=types.narrow,
        float32_ops=types.wide,
        casts=types.casts,
    )


def _bits(nodes: Sequence[NodeReport]) -> float:
    elements = sum(node.elements for node in nodes)
    return round(8 * sum(node.bytes_after for node in nodes) / elements, 3) if elements else 0.0
