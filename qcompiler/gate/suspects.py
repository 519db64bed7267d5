"""What may have made a model fail: the file, its calibration data, its scheme, single nodes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Final

import onnx_ir as ir

from qcompiler.calibration.calls import Samples, counted
from qcompiler.calibration.held_out import spread
from qcompiler.calibration.input_statistics import InputShift
from qcompiler.gate.value_errors import NodeError, largest_first, node_errors
from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.provenance import SCHEME, SQNR, origins_of
from qcompiler.progress import Progress
from qcompiler.quant.scheme import FLOAT
from qcompiler.report.verdict import Suspect

SHOWN: Final = 5
_CALLS: Final = 4
_WORTH_NAMING: Final = 0.05
"""Shift of an input in standard deviations, and share of the error of a node."""
_NODES: Final = 4
_COARSE_DB: Final = 20.0
"""Weights rounded to 4 bits in blocks of 32 have 21 to 23 dB."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a model beside the model.

    Attributes:
        changed: Whether the file is not the one its manifest speaks of.
        shifts: How the inputs of the samples differ from those of calibration.
    """

    changed: bool
    shifts: tuple[InputShift, ...]


def find_suspects(
    base: ir.Model,
    candidate: ir.Model,
    samples: Samples,
    evidence: Evidence,
    *,
    custom_op_libraries: Sequence[Path],
    progress: Progress,
) -> tuple[Suspect, ...]:
    """Return what may have made the outputs differ, the likeliest first.

    A changed file and foreign calibration data come first, since they are facts; then nodes and
    schemes by the share of the error that they explain.
    """
    ours = _by_origin(candidate)
    calls = [
        {v.name or "": call[v.name or ""] for v in base.graph.inputs if v.name in call}
        for call in spread(samples, _CALLS)
    ]
    errors = node_errors(
        base,
        candidate,
        calls,
        rescaled=bool(ours),
        custom_op_libraries=custom_op_libraries,
        progress=progress,
    )
    shares = list(largest_first(errors))
    ranked = [*_schemes(shares, ours), *_nodes(shares, ours)]
    ranked.sort(key=lambda suspect: -(suspect.share or 0.0))
    return (*_facts(evidence), *ranked)[:SHOWN]


def _facts(evidence: Evidence) -> Iterator[Suspect]:
    if evidence.changed:
        sentence = "its hash is not that of its manifest: it was changed after it was compiled"
        yield Suspect("file", "the candidate", None, sentence)
    for shift in sorted(evidence.shifts, key=lambda shift: -shift.shift):
        if shift.sure and shift.shift > _WORTH_NAMING:
            yield Suspect("data", f"input {shift.name}", None, shift.reason)


def _by_origin(candidate: ir.Model) -> Mapping[str, ir.Node]:
    """Return the nodes with a scheme by the names of the nodes they stand for."""
    return {
        name: node
        for node in all_nodes(candidate)
        if SCHEME in node.metadata_props
        for name in origins_of(node)
    }


def _nodes(
    shares: Sequence[tuple[NodeError, float]], ours: Mapping[str, ir.Node]
) -> Iterator[Suspect]:
    for entry, share in shares[:_NODES]:
        if share < _WORTH_NAMING:
            return
        node = ours.get(entry.node)
        scheme = "" if node is None else f", {node.metadata_props[SCHEME]}"
        weight = "" if node is None else _weight(node)
        sentence = (
            f"{entry.op_type}{scheme}{weight}: {entry.error:.2%} of what it computes is wrong, "
            f"{entry.before:.2%} of what it is computed from"
        )
        yield Suspect("node", entry.node, share, sentence)


def _weight(node: ir.Node) -> str:
    text = node.metadata_props.get(SQNR)
    return "" if text is None else f", its weight quantized with {float(text):.1f} dB"


def _schemes(
    shares: Sequence[tuple[NodeError, float]], ours: Mapping[str, ir.Node]
) -> Iterator[Suspect]:
    """Yield schemes that are too coarse, or whose error no single op is to blame for."""
    groups: dict[str, list[float]] = {}
    weights: dict[str, list[float]] = {}
    for entry, share in shares:
        node = ours.get(entry.node)
        scheme = FLOAT if node is None else node.metadata_props[SCHEME]
        if node is not None and scheme != FLOAT:
            bits = scheme.partition(":")[0]
            groups.setdefault(bits, []).append(share)
            weights.setdefault(bits, []).append(float(node.metadata_props.get(SQNR, "inf")))
    for scheme, found in groups.items():
        mean = sum(weights[scheme]) / len(found)
        blame = sum(found) if mean < _COARSE_DB else sum(found) - max(found)
        if blame < _WORTH_NAMING:
            continue
        quality = f", their weights with {mean:.1f} dB on average" if isfinite(mean) else ""
        sentence = (
            f"{sum(found):.0%} of the error comes from {counted(len(found), 'op')} in it{quality}: "
            "it may be too coarse for this bound"
        )
        yield Suspect("scheme", scheme, blame, sentence)
