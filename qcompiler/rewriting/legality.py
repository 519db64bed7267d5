"""What may be in a graph at each stage, as data; the verifier runs it after every pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.ir.dataflow import (
    all_graphs,
    all_nodes,
    constant_of,
    int_attribute,
    is_op,
    node_label,
    standard_opset,
)
from qcompiler.ir.provenance import CREATED_BY, REASON, SCHEME, scheme_of
from qcompiler.ir.quantizable import find_sites
from qcompiler.ir.weights import read_all
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor, scale_shape
from qcompiler.quant.qtype import QType
from qcompiler.quant.scheme import FLOAT, parse_scheme
from qcompiler.rewriting.stages import Stage

OPSET_OF: Final = MappingProxyType(
    {
        "FLOAT8E4M3FN": 19,
        "block_size": 21,
        "INT4": 21,
        "UINT4": 21,
        "INT2": 25,
        "UINT2": 25,
    }
)
"""First opset of QuantizeLinear and DequantizeLinear with an attribute or an element type."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One breach of a rule.

    Attributes:
        rule: Name of the rule.
        where: The node or value, as messages call it.
        fault: What is wrong there.
    """

    rule: str
    where: str
    fault: str


@dataclass(frozen=True, slots=True)
class LegalityRule:
    """A property that every model at or after a stage has.

    Attributes:
        name: Kebab-case name.
        sentence: The property, in words.
        check: Yields (where, fault) for each breach.
    """

    name: str
    sentence: str
    check: Callable[[ir.Model], Iterator[tuple[str, str]]]


def _no_constant_nodes(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in all_nodes(model):
        if is_op(node, "Constant") and "sparse_value" not in node.attributes:
            yield node_label(node), "a Constant node; constants are initializers from here on"


def _no_functions(model: ir.Model) -> Iterator[tuple[str, str]]:
    for domain, name, _ in model.functions:
        yield f"{domain}:{name}", "a model-local function; functions are inlined from here on"


def _unique_node_names(model: ir.Model) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for node in all_nodes(model):
        if not node.name:
            yield node_label(node), "has no name"
        elif node.name in seen:
            yield node_label(node), "shares its name with another node"
        seen.add(node.name or "")


def _initializers_have_values(model: ir.Model) -> Iterator[tuple[str, str]]:
    for graph in all_graphs(model):
        for name, value in graph.initializers.items():
            if value.const_value is None:
                yield name, "an initializer without a value"


def _schemes_assigned(model: ir.Model) -> Iterator[tuple[str, str]]:
    for site in find_sites(model)[0]:
        facts = site.node.metadata_props
        if SCHEME not in facts:
            yield node_label(site.node), "carries no scheme"
        elif facts[SCHEME] == FLOAT and not facts.get(REASON):
            yield node_label(site.node), "stays in float without a reason"


def _schemes_readable(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in all_nodes(model):
        text = node.metadata_props.get(SCHEME)
        if text is None:
            continue
        scheme = parse_scheme(text)
        if scheme is not None and scheme.symmetric is None:
            yield node_label(node), f"its scheme {text} leaves symmetric or asymmetric open"


def _opset_suffices(model: ir.Model) -> Iterator[tuple[str, str]]:
    opset = standard_opset(model)
    for node in _quantizers(model):
        used = ["block_size"] if int_attribute(node, "block_size", 0) else []
        values = (*node.inputs, *node.outputs)
        used += [v.dtype.name for v in values if v is not None and v.dtype is not None]
        for feature in used:
            if OPSET_OF.get(feature, 0) > opset:
                yield node_label(node), f"uses {feature} of opset {OPSET_OF[feature]} at {opset}"
                break


def _scales_positive(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in _quantizers(model):
        scale = constant_of(node.inputs[1])
        if scale is None:
            continue
        values = read_all(scale).astype(np.float32)
        if not np.all(np.isfinite(values)) or not np.all(values > 0):
            yield node_label(node), "its scale is not positive and finite everywhere"


def _scales_shaped(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in _quantizers(model):
        codes, scale = constant_of(node.inputs[0]), constant_of(node.inputs[1])
        if codes is None or scale is None or not is_op(node, "DequantizeLinear"):
            continue
        shape, found = tuple(codes.shape.numpy()), tuple(scale.shape.numpy())
        granularity = _granularity(node, len(shape), found)
        try:
            wanted = scale_shape(shape, granularity)
        except ValueError as error:
            yield node_label(node), str(error)
            continue
        # One scale for the whole tensor may be a vector of one (DequantizeLinear-13).
        if found != wanted and (found, wanted) != ((1,), ()):
            fault = f"its scale has shape {list(found)}, and {granularity} codes of shape "
            yield node_label(node), f"{fault}{list(shape)} need {list(wanted)}"


def _granularity(node: ir.Node, rank: int, scale: tuple[int, ...]) -> Granularity:
    """Return how a DequantizeLinear of codes of `rank` shares a scale of shape `scale`."""
    axis, block_size = int_attribute(node, "axis", 1), int_attribute(node, "block_size", 0)
    axis = axis + rank if axis < 0 else axis
    if block_size:
        return PerBlock(axis, block_size)
    return PerTensor() if scale in ((), (1,)) else PerAxis(axis)


def _zero_points_fit(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in _quantizers(model):
        zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        codes = node.inputs[0] if is_op(node, "DequantizeLinear") else None
        if zero_point is None:
            continue
        types = {v.dtype for v in (codes, zero_point) if v is not None and v.dtype is not None}
        if len(types) > 1:
            yield node_label(node), "its zero point and its codes differ in type"
        scale = constant_of(node.inputs[1])
        tensor = constant_of(zero_point)
        if tensor is None or scale is None or tensor.size == scale.size == 1:
            continue  # a vector of one stands for one number
        if tensor.shape != scale.shape:
            yield node_label(node), "its zero point and its scale differ in shape"


def _zero_points_in_range(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in _quantizers(model):
        tensor = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        qtype = _planned_type(node)
        if tensor is None or qtype is None:
            continue
        values = read_all(tensor).astype(np.int32)
        if np.any(values < qtype.qmin) or np.any(values > qtype.qmax):
            limits = f"{qtype.qmin} to {qtype.qmax}"
            yield node_label(node), f"a zero point lies outside {qtype} ({limits})"


def _planned_type(node: ir.Node) -> QType | None:
    """Return the type of the codes that a reader's scheme asks for; None where nobody says.

    Only of a DequantizeLinear that this compiler made: one of the source model may stand before
    the data input of an op that has a scheme for its weight.
    """
    if CREATED_BY not in node.metadata_props or not is_op(node, "DequantizeLinear"):
        return None
    if constant_of(node.inputs[0]) is None:
        return None  # an activation, whose type the placement table says
    readers = [use.node for use in node.outputs[0].uses()]
    while readers:
        reader = readers.pop(0)
        if is_op(reader, "Transpose"):
            readers += [use.node for use in reader.outputs[0].uses()]
        scheme = scheme_of(reader)
        if scheme is not None and scheme.symmetric is not None:
            return scheme.weight_type
    return None


def _weights_are_integers(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in all_nodes(model):
        if is_op(node, "QuantizeLinear") and constant_of(node.inputs[0]) is not None:
            yield node_label(node), "quantizes a constant at run time; store its codes instead"


def _no_float_site_with_scheme(model: ir.Model) -> Iterator[tuple[str, str]]:
    for site in find_sites(model)[0]:
        if scheme_of(site.node) is not None:
            yield node_label(site.node), "has a scheme, and a weight still in float"


def _quantizers(model: ir.Model) -> Iterator[ir.Node]:
    for node in all_nodes(model):
        if is_op(node, "QuantizeLinear", "DequantizeLinear"):
            yield node


LEGALITY: dict[Stage, tuple[LegalityRule, ...]] = {
    Stage.IMPORTED: (),
    Stage.CANONICAL: (
        LegalityRule("no-constant-nodes", "constants are initializers", _no_constant_nodes),
        LegalityRule("no-functions", "functions are inlined", _no_functions),
        LegalityRule("unique-names", "every node has its own name", _unique_node_names),
        LegalityRule("initializers", "every initializer has a value", _initializers_have_values),
    ),
    Stage.ASSIGNED: (
        LegalityRule("schemes-readable", "schemes are fully decided", _schemes_readable),
    ),
    Stage.QDQ: (
        LegalityRule("qdq-opset", "the opset has what Q/DQ nodes use", _opset_suffices),
        LegalityRule("positive-scales", "scales are positive and finite", _scales_positive),
        LegalityRule("scale-shapes", "scales have the shape of their granularity", _scales_shaped),
        LegalityRule("zero-points", "zero points match codes and scales", _zero_points_fit),
        LegalityRule("zero-point-range", "zero points are codes", _zero_points_in_range),
        LegalityRule("integer-weights", "weights are stored as codes", _weights_are_integers),
        LegalityRule("schemes-applied", "no planned site is float", _no_float_site_with_scheme),
    ),
    # What a target's own form may hold is its table's business: pass verify-target reads it.
    Stage.LOWERED: (),
}
"""Rules a stage adds; a stage also keeps all rules of the stages before it."""

ONLY_AT: dict[Stage, tuple[LegalityRule, ...]] = {
    Stage.ASSIGNED: (
        LegalityRule("schemes-assigned", "every site has a scheme or a reason", _schemes_assigned),
    ),
}
"""Rules that hold at a stage and not after it."""


def violations(model: ir.Model, stage: Stage) -> Iterator[Violation]:
    """Yield every breach of the rules of `stage`, those of earlier stages first."""
    rules = [
        rule for member in Stage if member.rank <= stage.rank for rule in LEGALITY[member]
    ] + list(ONLY_AT.get(stage, ()))
    for rule in rules:
        for where, fault in rule.check(model):
            yield Violation(rule.name, where, fault)
