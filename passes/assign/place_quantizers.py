"""Decides which activations are quantized, and writes it on nodes and values."""

import json
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompiler.ir.provenance import (
    PLACEMENT,
    PLACEMENT_REASON,
    QUANTIZED_INPUTS,
    QUANTIZER,
    REGION,
    SHARES,
    annotate,
    scheme_of,
)
from qcompiler.passes.assign.integer_regions import IntegerRegions, find_regions
from qcompiler.quant.qtype import QType, qtype_of
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage
from qcompiler.targets.placement import Placement


@dataclass(frozen=True, slots=True)
class PlaceOptions:
    """Options of `place-quantizers`.

    Attributes:
        placement: Where the target wants quantized activations.
    """

    placement: Placement


class PlaceQuantizers(Pass):
    """Mark the values that are to be quantized around ops with static activations.

    Before: y = Relu(Conv(x, w))       # Conv: qcompiler.scheme = "w8a8:sym"
    After:  y = Relu(Conv(x, w))       # x, y: qcompiler.quantizer = "uint8:asym"; Conv, Relu:
                                       # qcompiler.placement = the rule, qcompiler.region = 0
    Refuses: ops between quantized values whose inputs are computed in float or whose result
        nothing reads in integers; ops the target has no integer kernel for. Values in If, Loop
        and Scan bodies are never marked.

    The graph does not change. Run again, it forgets what it marked before.
    """

    name: ClassVar[str] = "place-quantizers"
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.EXACT

    options: PlaceOptions

    def __init__(self, options: PlaceOptions) -> None:
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Find the regions, then write them down."""
        changed = _forget_marks(model.graph)
        regions = find_regions(model, self.options.placement)
        rewrites = [] if not changed else [Rewrite("forget-marks", "", "marks of an earlier run")]
        rewrites += [
            Rewrite(rule.rule, node.name or "", f"reads quantized: {list(regions.reads(node))}")
            for node, rule in regions.members.items()
        ]
        _write(regions, self.options.placement)
        skips = [
            Skip("stays-in-float", node.name or "", reason)
            for node, reason in regions.refused.items()
        ]
        return PassResult(tuple(rewrites), tuple(skips))


def _forget_marks(graph: ir.Graph) -> bool:
    found = False
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for owner in (*graph, *values):
        for key in (PLACEMENT, QUANTIZED_INPUTS, REGION, PLACEMENT_REASON, QUANTIZER, SHARES):
            found |= owner.metadata_props.pop(key, None) is not None
    return found


def _write(regions: IntegerRegions, placement: Placement) -> None:
    numbers = regions.regions()
    for node, rule in regions.members.items():
        annotate(node, placement=rule.rule, region=numbers[node])
        annotate(node, placement_reason=f"on quantized activations it runs as {rule.kernel}")
        node.metadata_props[QUANTIZED_INPUTS] = json.dumps(list(regions.reads(node)))
    for node, reason in regions.refused.items():
        annotate(node, placement_reason=reason)
    symmetry = "sym" if placement.symmetric else "asym"
    for quantizer in regions.quantizers():
        qtype = _qtype(quantizer.value, regions)
        quantizer.value.metadata_props[QUANTIZER] = f"{qtype}:{symmetry}"
        if quantizer.shares is not None:
            quantizer.value.metadata_props[SHARES] = quantizer.shares.name or ""


def _qtype(value: ir.Value, regions: IntegerRegions) -> QType:
    """Return the type of a value's codes: that of the reader that asks for the most bits."""
    usual = regions.placement.qtype
    readers = [use.node for use in value.uses() if use.node in regions.members]
    schemes = [scheme_of(node) for node in readers]
    bits = [scheme.activation_bits for scheme in schemes if scheme is not None]
    return qtype_of(max(bits), signed=usual.signed) if bits else usual
