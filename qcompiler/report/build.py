"""Makes a report from the finished graph and what the passes recorded."""

import math
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from qcompiler.calibration.numerics import NumericsRecord
from qcompiler.execution.kernels import Kernel
from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.provenance import facts_of
from qcompiler.report.records import (
    NodeReport,
    OutputCheck,
    PassReport,
    SkipReport,
    Summary,
)
from qcompiler.rewriting.manager import PassRecord

_MERGED = "not found: the runtime merged or removed the op"
_NAMES_SHOWN = 4


def node_reports(model: ir.Model, kernels: Mapping[str, Kernel] | None) -> tuple[NodeReport, ...]:
    """Read what was decided from the nodes' metadata.

    Args:
        model: The compiled model.
        kernels: What the runtime runs, by node name; None if nobody looked.
    """
    found: list[NodeReport] = []
    for node in all_nodes(model):
        facts = facts_of(node)
        if "scheme" not in facts:
            continue
        scheme = facts["scheme"]
        kernel = None if kernels is None else kernels.get(node.name or "")
        missing = _MERGED if kernels is not None and scheme != "float" else None
        before = int(facts.get("weight_bytes_before", 0))
        found.append(
            NodeReport(
                name=_source_name(node, facts),
                op_type=facts.get("origin_op", node.op_type),
                scheme=scheme,
                rule=facts.get("rule", ""),
                reason=facts.get("reason", ""),
                weight=facts.get("weight"),
                elements=int(facts.get("weight_elements", 0)),
                bytes_before=before,
                bytes_after=int(facts.get("weight_bytes_after", before)),
                sqnr_db=float(facts["weight_sqnr_db"]) if "weight_sqnr_db" in facts else None,
                kernel=kernel.name if kernel else missing,
                integer_kernel=kernel.integer if kernel else None,
            )
        )
    return tuple(found)


def _source_name(node: ir.Node, facts: Mapping[str, str]) -> str:
    """Return what the source model called a node; one that absorbed others keeps its own name."""
    name = node.name or ""
    origin = facts.get("origin", name)
    return name if name in origin.split(" ") else origin


def float_kernel_warnings(nodes: Iterable[NodeReport]) -> tuple[str, ...]:
    """Say which ops are stored as integers and computed in float, one sentence a kernel."""
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
    return tuple(found)


def pass_reports(records: Iterable[PassRecord]) -> tuple[PassReport, ...]:
    """Turn the manager's records into the report's."""
    return tuple(
        PassReport(
            record.name,
            record.stage,
            record.numerics,
            round(record.seconds, 3),
            len(record.rewrites),
            tuple(SkipReport(skip.rule, skip.node, skip.reason) for skip in record.skips),
        )
        for record in records
    )


def output_checks(records: Iterable[NumericsRecord]) -> tuple[OutputCheck, ...]:
    """Turn numeric comparisons into the report's; an unchanged output has no SQNR."""
    return tuple(
        OutputCheck(
            record.name,
            record.output,
            record.max_abs,
            record.max_rel,
            round(record.sqnr_db, 2) if math.isfinite(record.sqnr_db) else None,
        )
        for record in records
    )


def summarize(nodes: Sequence[NodeReport], *, seconds: float) -> Summary:
    """Total the nodes; weights that several nodes share are counted once."""
    with_weight = [node for node in nodes if node.weight is not None]
    distinct = list({node.weight: node for node in reversed(with_weight)}.values())
    quantized = [node for node in distinct if node.quantized]
    qualities = [node.sqnr_db for node in quantized if node.sqnr_db is not None]
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
    )


def _bits(nodes: Sequence[NodeReport]) -> float:
    elements = sum(node.elements for node in nodes)
    return round(8 * sum(node.bytes_after for node in nodes) / elements, 3) if elements else 0.0


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
