"""Decides which activations are quantized, and writes it on nodes and values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompiler.errors import TargetError
from qcompiler.ir.dataflow import node_label
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
from qcompiler.quant.qtype import QType
from qcompiler.quant.scheme import QScheme
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

    Raises (from `run`):
        TargetError: One value is to be integers for one op, and floats of 8 bits for another.
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
    for quantizer in regions.quantizers():
        qtype = _qtype(quantizer.value, regions)
        symmetry = "sym" if placement.symmetric or qtype.floating else "asym"
        quantizer.value.metadata_props[QUANTIZER] = f"{qtype}:{symmetry}"
        if quantizer.shares is not None:
            quantizer.value.metadata_props[SHARES] = quantizer.shares.name or ""


def _qtype(value: ir.Value, regions: IntegerRegions) -> QType:
    """Return the type of a value's codes: that of the reader that asks for the most bits."""
    usual = regions.placement.qtype
    readers = {use.node: scheme_of(use.node) for use in value.uses() if use.node in regions.members}
    schemes = {node: scheme for node, scheme in readers.items() if scheme is not None}
    if not schemes:
        # What is added to the sums of an op has codes of the type that it multiplies.
        summed = (regions.joined(node) for node in readers)
        schemes = {node: scheme for node in summed if node and (scheme := scheme_of(node))}
    _require_one_kind(value, schemes)
    types = [scheme.activation_type(signed=usual.signed) for scheme in schemes.values()]
    return max(types, key=lambda qtype: qtype.bits, default=usual)


def _require_one_kind(value: ir.Value, schemes: Mapping[ir.Node, QScheme]) -> None:
    """Refuse readers of which some want integers, and others floats.

    Raises:
        TargetError: There are both.
    """
    floats = next((node for node, scheme in schemes.items() if scheme.floating), None)
    integers = next((node for node, scheme in schemes.items() if not scheme.floating), None)
    if floats is not None and integers is not None:
        message = f"{value.name} would be fp8 codes for it, and integers for {node_label(integers)}"
        hint = "give both the same scheme, or leave one of them in float"
        raise TargetError(message, where=node_label(floats), hint=hint)
