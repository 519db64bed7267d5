"""What may be in a graph at each stage, as data; the verifier runs it after every pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.ir.dataflow import all_graphs, all_nodes, constant_of, is_op, node_label
from qcompiler.ir.provenance import REASON, SCHEME
from qcompiler.ir.quantizable import find_sites
from qcompiler.quant.scheme import parse_scheme
from qcompiler.rewriting.stages import Stage


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
        elif facts[SCHEME] == "float" and not facts.get(REASON):
            yield node_label(site.node), "stays in float without a reason"


def _schemes_readable(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in all_nodes(model):
        text = node.metadata_props.get(SCHEME)
        if text is None:
            continue
        scheme = parse_scheme(text)
        if scheme is not None and scheme.symmetric is None:
            yield node_label(node), f"its scheme {text} leaves symmetric or asymmetric open"


def _scales_positive(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in _quantizers(model):
        scale = constant_of(node.inputs[1])
        if scale is None:
            continue
        values = scale.numpy().astype(np.float32)
        if not np.all(np.isfinite(values)) or not np.all(values > 0):
            yield node_label(node), "its scale is not positive and finite everywhere"


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
        if tensor is not None and scale is not None and tensor.shape != scale.shape:
            yield node_label(node), "its zero point and its scale differ in shape"


def _weights_are_integers(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in all_nodes(model):
        if is_op(node, "QuantizeLinear") and constant_of(node.inputs[0]) is not None:
            yield node_label(node), "quantizes a constant at run time; store its codes instead"


def _no_float_site_with_scheme(model: ir.Model) -> Iterator[tuple[str, str]]:
    for site in find_sites(model)[0]:
        if site.node.metadata_props.get(SCHEME, "float") != "float":
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
    Stage.EQUALIZED: (),
    Stage.ASSIGNED: (
        LegalityRule("schemes-readable", "schemes are fully decided", _schemes_readable),
    ),
    Stage.QDQ: (
        LegalityRule("positive-scales", "scales are positive and finite", _scales_positive),
        LegalityRule("zero-points", "zero points match codes and scales", _zero_points_fit),
        LegalityRule("integer-weights", "weights are stored as codes", _weights_are_integers),
        LegalityRule("schemes-applied", "no planned site is float", _no_float_site_with_scheme),
    ),
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
