"""Why a term must stay float32: what an op does, what a constant holds, what samples showed."""

from collections.abc import Iterator, Mapping
from typing import Final

import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes, constant_of, inputs_with_captures, int_attribute, is_op
from qcompiler.ir.float_types import (
    SENSITIVE,
    is_control_flow,
    is_float32,
    is_scale,
)
from qcompiler.passes.lower.cast_constants import ConstantCaster, ConstantFacts
from qcompiler.passes.lower.cast_graph import FLOAT32_TERM, Read, TypedGraph
from qcompiler.passes.lower.cast_masks import MASK, only_masks
from qcompiler.passes.lower.cast_measure import Extremes
from qcompiler.quant.compute_type import ComputeType

_EXACT_READERS: Final = (
    *("Sin", "Cos", "Tan", "Floor", "Ceil", "Round", "Mod", "Equal", "Less", "LessOrEqual"),
    *("Greater", "GreaterOrEqual", "Range", "CumSum", "OneHot", "ArgMax", "ArgMin", "TopK"),
)
"""Where positions and counts are wanted exactly; 16 bits hold integers up to 2048 or 256."""
_ANGLES: Final = ("Sin", "Cos", "Tan")
_ANGLE_ERROR: Final = 2.0**-9
"""Largest rounding of an angle that is taken, in radians."""
_LONG_SOFTMAX: Final = 2048
"""From here on, adding 1 to a float16 sum changes nothing. Shorter ones are left to the runtimes,
whose kernels add up in float32."""
_LEAST_SCALE: Final = 256
"""Times the smallest number: from here on a scale is off by 0.2 % at most, half as much as 8 bits
round what it scales."""
_DIVISOR: Final = 1
"""Input of Div in which nothing may become 0. Norms add an epsilon before they divide."""


class Forced:
    """The terms that must be float32, each with the first reason that was found.

    Attributes:
        reasons: By term.
    """

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}

    def add(self, term: int, reason: str) -> None:
        """Force a term."""
        if term != FLOAT32_TERM:
            self.reasons.setdefault(term, reason)

    def add_value(self, graph: TypedGraph, value: ir.Value, reason: str) -> bool:
        """Force what makes and what reads a value; returns whether any of it was free."""
        before = len(self.reasons)
        for term in graph.neighbours(value):
            self.add(term, reason)
        return len(self.reasons) > before


def force_by_op(graph: TypedGraph, forced: Forced) -> None:
    """Force what the range or precision of an op asks for, whatever the data."""
    for node, term in graph.term_of.items():
        if is_op(node, *SENSITIVE):
            forced.add(term, SENSITIVE[node.op_type])
        elif is_op(node, "Mul") and node.inputs[0] is node.inputs[1]:
            forced.add(term, "it squares, which leaves the range of 16 bits for moderate data")
        elif _is_adding_scatter(node):
            forced.add(term, "it adds what it scatters, which runtimes do in float32 only")
        elif _is_marked_island(node):
            forced.add(term, "the source model casts it to float32")
        elif (length := _softmax_length(node)) > _LONG_SOFTMAX:
            forced.add(term, f"it adds up {length} exponentials")
    for value, reader in _exact_numbers(graph.model):
        reason = f"{value.name} is made of integers, and {reader} needs it exactly"
        if value in graph.producer:
            forced.add(graph.producer[value], reason)


def _softmax_length(node: ir.Node) -> int:
    """Return how many numbers a Softmax adds up; 0 where that varies, or it is none."""
    source = node.inputs[0] if node.inputs else None
    if not is_op(node, "Softmax", "LogSoftmax") or source is None or source.shape is None:
        return 0
    length = source.shape[int_attribute(node, "axis", -1)] if len(source.shape) else 0
    return length if isinstance(length, int) else 0


def _is_marked_island(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    wide = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    # A constant that is stored in 16 bits is widened for its readers' sake, not for its own.
    return (
        is_op(node, "Cast")
        and source is not None
        and source.dtype in wide
        and constant_of(source) is None
    )


def _is_adding_scatter(node: ir.Node) -> bool:
    reduction = node.attributes.get("reduction")
    added = reduction is not None and reduction.as_string() != "none"
    return added and is_op(node, "ScatterND", "ScatterElements")


def _exact_numbers(model: ir.Model) -> Iterator[tuple[ir.Value, str]]:
    """Yield float values made of integers and constants alone that a reader wants exactly.

    Such are positions, their angles, sizes, and indices that are computed in floats.
    """
    made = _made_of_integers(model)
    seen: set[ir.Value] = set()
    for node in all_nodes(model):
        if not (is_op(node, *_EXACT_READERS) or _casts_to_integer(node)):
            continue
        pending = [value for value in node.inputs if value in made]
        while pending:
            value = pending.pop()
            if value is None or value in seen:
                continue
            seen.add(value)
            yield value, f"{node.op_type} {node.name}"
            producer = value.producer()
            if producer is not None:
                pending += [source for source in producer.inputs if source in made]


def _made_of_integers(model: ir.Model) -> set[ir.Value]:
    """Return the float32 values that depend on no float input and on no float weight of size."""
    made: set[ir.Value] = set()
    for node in all_nodes(model):
        if is_control_flow(node):
            continue
        sources = [value for value in node.inputs if value is not None]
        floats = [value for value in sources if is_float32(value) and not _is_parameter(value)]
        if all(value in made for value in floats) and any(is_float32(v) for v in node.outputs):
            made.update(value for value in node.outputs if is_float32(value))
    return made


def _is_parameter(value: ir.Value) -> bool:
    """Whether a constant is a number or a vector, such as frequencies, not a weight matrix."""
    tensor = value.const_value
    if tensor is None or value.is_graph_input():
        return False
    shape = tensor.shape.numpy()
    return sum(1 for size in shape if size > 1) <= 1


def _casts_to_integer(node: ir.Node) -> bool:
    return is_op(node, "Cast") and ir.DataType(node.attributes["to"].as_int()).is_integer()


def force_by_constants(
    graph: TypedGraph, caster: ConstantCaster, forced: Forced
) -> dict[ir.Value, float]:
    """Force what reads constants that the 16-bit type cannot hold.

    Returns:
        Constants that may be clipped, with the largest magnitude: they mask a Softmax.
    """
    masks: dict[ir.Value, float] = {}
    compute = graph.compute
    for value, reads in graph.constants.items():
        tensor = value.const_value
        assert tensor is not None
        facts = caster.facts(tensor)
        if facts.peak > compute.largest and only_masks(value, facts, compute.largest):
            masks[value] = min(MASK, compute.largest)
            continue
        for read in reads:
            reason = _fault(value.name or "", facts, read, compute)
            if reason:
                forced.add(read.term, reason)
                _force_integer_products(graph, read, reason, forced)
    return masks


def _force_integer_products(graph: TypedGraph, read: Read, reason: str, forced: Forced) -> None:
    """Force the products of what a scale in float32 decodes, where their data has codes as well.

    A Cast between the codes and their product would keep runtimes from multiplying integers.
    """
    node = read.owner
    if not isinstance(node, ir.Node) or not is_scale(node, read.index):
        return
    for use in node.outputs[0].uses():
        decoded = sum(1 for value in use.node.inputs if value is not None and _is_decoded(value))
        if decoded > 1 and use.node in graph.term_of:
            forced.add(graph.term_of[use.node], reason)


def _is_decoded(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and is_op(producer, "DequantizeLinear")


def _fault(name: str, facts: ConstantFacts, read: Read, compute: ComputeType) -> str:
    """Return why a constant cannot be read in the 16-bit type, "" if it can."""
    if facts.peak > compute.largest:
        return f"{name} holds {_signed(facts):.4g}, and {compute} ends at {compute.largest:.5g}"
    node = read.owner
    if isinstance(node, ir.Node) and is_scale(node, read.index):
        if facts.tiny >= _LEAST_SCALE * compute.smallest:
            return ""
        return f"a scale in {name} is {facts.tiny:.4g}, where {compute} has few digits or none"
    if 0 < facts.peak < compute.smallest_normal:
        end = compute.smallest_normal
        return f"{name} holds {_signed(facts):.4g}, and below {end:.2g} {compute} loses digits"
    if not isinstance(node, ir.Node) or facts.tiny >= compute.smallest_normal:
        return ""
    vanishes = facts.tiny <= compute.smallest / 2
    if is_op(node, "Div") and read.index == _DIVISOR and vanishes:
        return f"{name} holds {facts.tiny:.4g}, which {compute} makes 0, and it is divided by"
    return ""


def _signed(facts: ConstantFacts) -> float:
    return facts.high if facts.high >= -facts.low else facts.low


def force_by_range(
    graph: TypedGraph,
    measured: Mapping[str, Extremes],
    masks: Mapping[ir.Value, float],
    margin: float,
    forced: Forced,
) -> None:
    """Force what makes and reads values that left the range on samples, or nearly did.

    Args:
        graph: The terms.
        measured: Extremes of values by name.
        masks: Constants that are going to be clipped; what they make is not judged.
        margin: How much larger values may be on other data.
        forced: Gets the terms.
    """
    compute = graph.compute
    excused = _behind(masks)
    for value in graph.producer:
        found = measured.get(value.name or "")
        if found is None:
            continue
        if found.peak * margin > compute.largest and value not in excused:
            reason = f"{value.name} reaches {found.peak:.4g} on the samples, and with a margin of "
            reason += f"{margin:g} that is beyond the {compute.largest:.5g} of {compute}"
            forced.add_value(graph, value, reason)
        elif 0 < found.peak < compute.smallest_normal:
            reason = f"{value.name} is never larger than {found.peak:.4g} on the samples, and "
            reason += f"below {compute.smallest_normal:.2g} {compute} loses digits"
            forced.add_value(graph, value, reason)
        elif found.peak * compute.epsilon > _ANGLE_ERROR and _is_angle(value):
            reason = f"{value.name} is an angle of up to {found.peak:.4g} on the samples"
            forced.add_value(graph, value, f"{reason}, which {compute} rounds too far")


def _is_angle(value: ir.Value) -> bool:
    return any(is_op(use.node, *_ANGLES) for use in value.uses())


def _behind(masks: Mapping[ir.Value, float]) -> set[ir.Value]:
    """Return all values that masks lead to; a Softmax, which ends them, included."""
    found: set[ir.Value] = set()
    pending = list(masks)
    while pending:
        for use in pending.pop().uses():
            if is_op(use.node, "Softmax"):
                continue
            for value in use.node.outputs:
                if value not in found:
                    found.add(value)
                    pending.append(value)
    return found


def force_around(
    graph: TypedGraph, value: ir.Value, reach: int, reason: str, forced: Forced
) -> bool:
    """Force what makes and reads a value, and what lies up to `reach` nodes before it.

    Returns:
        Whether any of it was free.
    """
    grown = False
    ring = [value]
    for _ in range(reach + 1):
        before: list[ir.Value] = []
        for member in ring:
            grown |= forced.add_value(graph, member, reason)
            producer = member.producer()
            if producer is not None:
                before += inputs_with_captures(producer)
                before += _returned(producer)
        # A constant does not lead on to its other readers.
        ring = [source for source in before if source in graph.producer]
    return grown


def _returned(node: ir.Node) -> list[ir.Value]:
    """Return what the bodies of a node return."""
    if not is_control_flow(node):
        return []
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return [value for graph in graphs for value in graph.outputs]
