"""How two artefacts differ, node by node."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.load import load_model
from qcompiler.report.build import node_reports
from qcompiler.report.files import read_report
from qcompiler.report.records import NodeReport, Report

_NODE_FIELDS: Final = (
    *("op_type", "scheme", "rule", "kernel", "integer_kernel", "bytes_after", "placement"),
    *("sqnr_db", "data_sqnr_db", "output_sqnr_db", "sensitivity_db", "equalized", "reason"),
    *("compute_type", "type_reason"),
)
"""Times are left out: they differ from run to run."""
_SUMMARY_FIELDS: Final = (
    *("sites", "quantized", "weight_bytes_after", "average_bits", "average_bits_all"),
    *("worst_sqnr_db", "integer_kernels", "latency_ratio", "compute_type", "narrow_ops"),
    *("float32_ops", "casts"),
)
_ENGINE_FIELDS: Final = ("bytes", "version", "weights", "as_planned")
_SAME_DB: Final = 0.05
"""Decibels that are shown as equal are equal."""

Pair = tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Artefact:
    """What is compared.

    Attributes:
        name: The file.
        facts: What is known of the whole: sizes, hashes, totals, settings.
        nodes: By node name, what is known of it, in graph order.
    """

    name: str
    facts: Mapping[str, Any]
    nodes: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class NodeDifference:
    """A node that is not the same in both.

    Attributes:
        name: The node, as the source model calls it.
        where: "both", or the side that alone has it: "a" or "b".
        changes: By field, its value in a and in b; empty where one side has no such node.
    """

    name: str
    where: str
    changes: Mapping[str, Pair]


@dataclass(frozen=True, slots=True)
class Difference:
    """How two artefacts differ.

    Attributes:
        a: Name of the one.
        b: Name of the other.
        facts: By field, what differs of the whole.
        nodes: Nodes that differ, in the order of a, then those that only b has.
        same: How many nodes do not.
    """

    a: str
    b: str
    facts: Mapping[str, Pair]
    nodes: tuple[NodeDifference, ...]
    same: int
    schema: str = field(default="qcompiler-diff")
    schema_version: int = 1

    def to_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_artefact(path: Path) -> Artefact:
    """Read a report, or a model with the report beside it, if there is one.

    A model of this compiler without a report tells what its nodes' metadata say; any other model
    only which ops it has.

    Raises:
        UsageError: It is neither a report nor a file.
        ModelError: The model is malformed.
    """
    if path.suffix == ".json":
        return _of_report(path.name, read_report(path))
    beside = path.with_suffix(".report.json")
    if beside.exists():
        return _of_report(path.name, read_report(beside))
    model = load_model(path)
    entries = node_reports(model, None)
    if entries:
        return Artefact(path.name, {}, _nodes(entries))
    ops = {node.name or "": {"op_type": node.op_type} for node in all_nodes(model)}
    return Artefact(path.name, {}, ops)


def _of_report(name: str, report: Report) -> Artefact:
    facts: dict[str, Any] = {
        "source sha256": report.source.sha256,
        "output sha256": report.output.sha256,
        "output bytes": report.output.bytes,
        "target": report.target,
        "recipe": report.recipe,
        "runtime": report.runtime,
    }
    facts |= {name: getattr(report.summary, name) for name in _SUMMARY_FIELDS}
    facts |= {f"setting {name}": value for name, value in report.settings.items()}
    if report.metric is not None:
        facts[f"metric {report.metric.name}"] = report.metric.compiled
    if report.engine is not None:
        facts |= {f"engine {name}": getattr(report.engine, name) for name in _ENGINE_FIELDS}
    if report.calibration is not None:
        facts |= {
            "samples sha256": report.calibration.sha256,
            "observer": report.calibration.observer,
        }
        for output in report.calibration.outputs:
            facts[f"output {output.name} dB"] = output.native_db
    return Artefact(name, facts, _nodes(report.nodes))


def _nodes(entries: tuple[NodeReport, ...]) -> dict[str, dict[str, Any]]:
    return {entry.name: {name: getattr(entry, name) for name in _NODE_FIELDS} for entry in entries}


def compare(a: Artefact, b: Artefact) -> Difference:
    """Return how two artefacts differ."""
    nodes = tuple(_node_differences(a, b))
    changed = sum(1 for node in nodes if node.where == "both")
    both = len(a.nodes.keys() & b.nodes.keys())
    return Difference(a.name, b.name, _changes(a.facts, b.facts), nodes, both - changed)


def _node_differences(a: Artefact, b: Artefact) -> Iterator[NodeDifference]:
    for name, facts in a.nodes.items():
        if name not in b.nodes:
            yield NodeDifference(name, "a", {})
        elif changes := _changes(facts, b.nodes[name]):
            yield NodeDifference(name, "both", changes)
    for name in b.nodes:
        if name not in a.nodes:
            yield NodeDifference(name, "b", {})


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Pair]:
    names = dict.fromkeys((*one, *other))
    pairs = {name: (one.get(name), other.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if not _equal(name, pair)}


def _equal(name: str, pair: Pair) -> bool:
    one, other = pair
    decibels = name.endswith(("_db", " dB"))
    if decibels and one is not None and other is not None:
        return bool(abs(one - other) < _SAME_DB)
    return bool(one == other)


def difference_lines(found: Difference) -> Iterator[str]:
    """Yield a difference as text."""
    yield f"a: {found.a}"
    yield f"b: {found.b}"
    for name, pair in found.facts.items():
        yield f"{name}: {_shown(pair[0])} -> {_shown(pair[1])}"
    for node in found.nodes:
        if node.where == "both":
            yield node.name
            for name, pair in node.changes.items():
                yield f"  {name}: {_shown(pair[0])} -> {_shown(pair[1])}"
        else:
            yield f"{node.name}: only in {node.where}"
    changed = sum(1 for node in found.nodes if node.where == "both")
    alone = len(found.nodes) - changed
    yield f"{changed} nodes differ, {alone} are in one only, {found.same} are the same"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value).strip().replace("\n", "; ")
