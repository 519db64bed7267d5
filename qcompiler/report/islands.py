"""What a report says of islands, read from the graph."""

import json

import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.provenance import ISLANDS, facts_of, origins_of
from qcompiler.report.records import IslandSite, IslandsReport


def islands_report(model: ir.Model) -> IslandsReport | None:
    """Return what was decided about islands; None where nobody asked for any."""
    text = model.metadata_props.get(ISLANDS)
    if text is None:
        return None
    return IslandsReport(**json.loads(text), sites=tuple(_sites(model)))


def _sites(model: ir.Model) -> list[IslandSite]:
    found = []
    for node in all_nodes(model):
        facts = facts_of(node)
        if "saliency" not in facts:
            continue
        found.append(
            IslandSite(
                next(iter(origins_of(node)), node.name or ""),
                int(facts["layer"]),
                facts["projection"],
                facts["scheme"],
                int(facts["weight_elements"]),
                float(facts["saliency"]),
                int(facts.get("island_elements", 0)),
                float(facts.get("island_saliency", 0)),
                int(facts.get("island_bytes", 0)),
            )
        )
    return found
