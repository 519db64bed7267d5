"""What a report says of islands: read from the graph, and laid out by layer and projection."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.provenance import ISLANDS, facts_of, origins_of
from qcompiler.report.records import IslandSite, IslandsReport


@dataclass(frozen=True, slots=True)
class GridCell:
    """What lies in one kind of projection of one layer.

    Attributes:
        saliency: Its part of the saliency of all weights, 0 to 1.
        island_part: The part of its weights that lies in islands, 0 to 1.
    """

    saliency: float
    island_part: float


@dataclass(frozen=True, slots=True)
class IslandGrid:
    """Weights that can have islands, layers down and projections across.

    Attributes:
        layers: Numbers of layers, ascending; -1 outside all of them.
        projections: What they are in their layers, in graph order.
        rows: For each layer a cell for each projection; None where a layer has no such weight.
    """

    layers: tuple[int, ...]
    projections: tuple[str, ...]
    rows: tuple[tuple[GridCell | None, ...], ...]


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


def island_grid(islands: IslandsReport) -> IslandGrid:
    """Lay out the weights of a report by layer and projection."""
    projections = tuple(dict.fromkeys(site.projection for site in islands.sites))
    layers = tuple(sorted({site.layer for site in islands.sites}))
    places: dict[tuple[int, str], list[IslandSite]] = {}
    for site in islands.sites:
        places.setdefault((site.layer, site.projection), []).append(site)
    rows = (tuple(_cell(places.get((layer, name), ())) for name in projections) for layer in layers)
    return IslandGrid(layers, projections, tuple(rows))


def _cell(sites: Sequence[IslandSite]) -> GridCell | None:
    if not sites:
        return None
    elements = sum(site.elements for site in sites)
    inside = sum(site.island_elements for site in sites)
    return GridCell(sum(site.saliency for site in sites), inside / max(1, elements))
