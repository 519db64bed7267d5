"""Writing chosen islands into a graph: side paths, schemes, and what is known of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.ir.blocks import find_layers, place_in_layer
from qcompiler.ir.islands import mark_island, side_bytes
from qcompiler.ir.provenance import ISLANDS, annotate, scheme_of
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.ir.side_paths import SidePathBuilder
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.assign.island_plans import IslandPlan
from qcompiler.passes.assign.island_subjects import RULE, Subjects, site_bits
from qcompiler.quant.islands import IslandKind, IslandRequest
from qcompiler.quant.scheme import FLOAT
from qcompiler.reconstruction.island_scores import ScoredWeights
from qcompiler.rewriting.base import Rewrite


@dataclass(frozen=True, slots=True)
class _Held:
    """What of one weight lies in islands.

    Attributes:
        elements: How many elements.
        saliency: Their part of the weight's saliency, as a sum of scores.
        detail: What was done, one clause.
    """

    elements: int
    saliency: float
    detail: str


class IslandWriter:
    """Rewrites one model."""

    def __init__(
        self,
        model: ir.Model,
        subjects: Subjects,
        request: IslandRequest,
        scored: ScoredWeights,
        store: WeightStore,
    ) -> None:
        self._model = model
        self._subjects = subjects
        self._request = request
        self._scored = scored
        self._store = store
        self._builder = SidePathBuilder(
            model, store, RULE, main="rest", side="island", shared=False
        )
        self._bits = subjects.base_bits

    def write(
        self, plan: IslandPlan, concentration: Mapping[str, float], task: str
    ) -> list[Rewrite]:
        """Rewrite every weight that has islands, and write on all what they hold."""
        rewrites: list[Rewrite] = []
        sums = {name: self._sum(name) for name in self._subjects.names}
        total = sum(sums.values())
        held_by_all, elements = 0.0, 0
        layers = {node: layer.index for layer in find_layers(self._model) for node in layer.nodes}
        for site in self._subjects.sites:
            name = site.weight.name or ""
            held = self._write_one(site, plan)
            share = sums[name] / total if total else 0.0
            annotate(
                site.node,
                saliency=f"{share:.6g}",
                layer=layers.get(site.node, -1),
                projection=place_in_layer(site.node),
            )
            if held is None:
                continue
            within = held.saliency / sums[name] if sums[name] else 0.0
            annotate(site.node, island_elements=held.elements, island_saliency=f"{within:.6g}")
            held_by_all += held.saliency
            elements += held.elements
            rewrites.append(
                Rewrite(RULE, site.label, f"{held.detail}, {within:.1%} of its saliency")
            )
        self._model.metadata_props[ISLANDS] = json.dumps(
            {
                "kind": self._request.kind.value,
                "saliency": self._request.saliency.value,
                "budget": str(self._request.budget),
                "task": task,
                "loss": None if self._scored.loss is None else float(f"{self._scored.loss:.6g}"),
                "weights": self._subjects.elements,
                "elements": elements,
                "average_bits": round(self._bits / self._subjects.elements, 4),
                "average_bits_without": round(
                    self._subjects.base_bits / self._subjects.elements, 4
                ),
                "share": round(held_by_all / total, 6) if total else 0.0,
                "concentration": {name: round(part, 6) for name, part in concentration.items()},
            }
        )
        return rewrites

    def _sum(self, name: str) -> float:
        return float(self._scored.scores.get(name).sum(dtype=np.float64))

    def _write_one(self, site: Site, plan: IslandPlan) -> _Held | None:
        name = site.weight.name or ""
        if plan.schemes is not None:
            return self._write_scheme(site, plan)
        if plan.cut is not None:
            return self._write_elements(site, plan)
        if name not in plan.channels:
            return None
        if plan.high is not None:
            return self._write_blocks(site, plan)
        channels = plan.channels[name]
        held = self._held_channels(site, plan, "at 16 bits")
        side = self._builder.split_channels(site, channels, _half(site))
        mark_island(site.node, IslandKind.COLUMN, side)
        self._count(site, side_bytes(side))
        annotate(
            side.node,
            scheme=FLOAT,
            rule=RULE,
            reason=f"input channels of {site.label} that the task depends on",
        )
        return held

    def _write_elements(self, site: Site, plan: IslandPlan) -> _Held | None:
        assert plan.cut is not None
        name = site.weight.name or ""
        scores = self._scored.scores.get(name)
        mask = plan.cut.mask(name, scores)
        count = int(np.count_nonzero(mask))
        if not count:
            return None
        side = self._builder.split_elements(site, mask, _half(site) or site.tensor.dtype)
        mark_island(site.node, IslandKind.WEIGHT, side)
        self._count(site, side_bytes(side))
        saliency = float(scores[mask].sum(dtype=np.float64))
        return _Held(count, saliency, f"{count} weights at 16 bits")

    def _write_blocks(self, site: Site, plan: IslandPlan) -> _Held:
        assert plan.high is not None
        name = site.weight.name or ""
        found = plan.high[name]
        scheme = found.scheme
        assert scheme is not None
        held = self._held_channels(site, plan, f"at {scheme.weight_bits} bits")
        before = scheme_of(site.node)
        side = self._builder.split_channels(site, plan.channels[name])
        # Its elements are counted where they were.
        annotate(
            side.node,
            weight=side.values.name or "",
            weight_elements=0,
            weight_bytes_before=0,
        )
        reason = f"input channels of {site.label} that the task depends on, at more than {before}"
        annotate(side.node, scheme=str(scheme), rule=found.rule, reason=reason)
        index = side.index[0].const_value
        assert index is not None
        self._count(site, index.nbytes)
        part = next(each for each in find_sites(self._model)[0] if each.node is side.node)
        self._bits += site_bits(part, stored=self._request.budget.nbytes is not None)
        return held

    def _write_scheme(self, site: Site, plan: IslandPlan) -> _Held | None:
        assert plan.schemes is not None
        name = site.weight.name or ""
        found, before = plan.schemes[name], scheme_of(site.node)
        scheme = None if found is None else found.scheme
        if scheme == before:
            return None
        stored = self._request.budget.nbytes is not None
        self._bits -= site_bits(site, stored=stored)
        text = FLOAT if scheme is None else str(scheme)
        reason = f"the least damage to the task within {self._request.budget}, rather than {before}"
        annotate(site.node, scheme=text, rule=RULE if found is None else found.rule, reason=reason)
        self._bits += site_bits(site, stored=stored)
        more = scheme is None or (before is not None and scheme.weight_bits > before.weight_bits)
        saliency = self._sum(name) if more else 0.0
        return _Held(site.tensor.size if more else 0, saliency, f"{before} -> {text}")

    def _held_channels(self, site: Site, plan: IslandPlan, detail: str) -> _Held:
        name = site.weight.name or ""
        channels = plan.channels[name]
        scores = np.take(self._scored.scores.get(name), channels, axis=site.axes.reduction)
        count = len(channels)
        return _Held(
            scores.size,
            float(scores.sum(dtype=np.float64)),
            f"{count} of {site.reduction} input channels {detail}",
        )

    def _count(self, site: Site, nbytes: int) -> None:
        """Write what an island takes on its node."""
        annotate(site.node, island_bytes=nbytes)
        self._bits += 8 * nbytes


def _half(site: Site) -> ir.DataType | None:
    """Return the 16-bit type that islands of a float32 weight are stored in; else its own, None."""
    return ir.DataType.FLOAT16 if site.tensor.dtype == ir.DataType.FLOAT else None
