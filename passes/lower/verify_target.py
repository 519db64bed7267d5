"""Checks a lowered model against the tables of its target."""

from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir

from qcompiler.errors import InternalError, QCompilerError, TargetError
from qcompiler.ir.dataflow import all_nodes, is_op, node_label, standard_domain, standard_opset
from qcompiler.ir.provenance import CREATED_BY, RULE, SCHEME
from qcompiler.ir.quantizable import row_of
from qcompiler.passes.lower.quantizer_demands import broken_demand
from qcompiler.quant.scheme import FLOAT
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult
from qcompiler.rewriting.stages import Stage
from qcompiler.targets.capability import Target
from qcompiler.targets.processors import PROCESSORS, without_type
from qcompiler.targets.rows import LoweredOp

_ALL_CODES: Final = frozenset(name for one in PROCESSORS for name in one.code_types)


@dataclass(frozen=True, slots=True)
class VerifyTargetOptions:
    """Options of `verify-target`.

    Attributes:
        target: The tables to check against.
    """

    target: Target


class VerifyTarget(Pass):
    """Check, read-only, that a target's tables allow every node this compiler answers for.

    Before: a Q/DQ model after the target's lowering passes.
    After:  the same model, at stage LOWERED.
    Refuses: nothing; an opset the target does not load, a Q/DQ node or a node made by a pass
        that is not in the target's table, or a site planned by a row the target does not have,
        is turned down with a TargetError that names the node. What the target's own lowering
        passes made wrong is an InternalError.
    """

    name: ClassVar[str] = "verify-target"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = Numerics.EXACT

    options: VerifyTargetOptions

    def __init__(self, options: VerifyTargetOptions) -> None:
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Check opset, nodes and plan.

        Raises:
            TargetError: The target cannot run the model.
            InternalError: A lowering pass of the target made a node that it cannot run.
        """
        target = self.options.target
        _check_opset(model, target)
        forms: dict[tuple[str, str], list[LoweredOp]] = {}
        for form in target.lowered_ops:
            forms.setdefault(form.op, []).append(form)
        rules = {row.rule for row in target.rows}
        for node in all_nodes(model):
            _check_exists(node, target)
            if CREATED_BY in node.metadata_props or is_op(
                node, "QuantizeLinear", "DequantizeLinear"
            ):
                fault = _fault(node, forms.get(_op_of(node), [])) or _unfit(node, target)
                if fault:
                    raise _error(node, target, fault)
            _check_compute_type(node, target)
            _check_rule(node, target, rules)
        return PassResult()


def _check_opset(model: ir.Model, target: Target) -> None:
    version = standard_opset(model)
    if not target.opset_min <= version <= target.opset_max:
        message = f"{target.title} loads opset {target.opset_min} to {target.opset_max}, "
        message += f"and the model is at {version}"
        raise TargetError(message, hint=f"export it with an opset up to {target.opset_max}")


def _check_exists(node: ir.Node, target: Target) -> None:
    """Refuse an op that the target does not have, whoever made it."""
    domain, name = _op_of(node)
    for missing in target.missing_ops:
        if domain == missing.domain and (not missing.names or name in missing.names):
            message = f"{target.title} has no {'.'.join(part for part in (domain, name) if part)}"
            raise TargetError(message, where=node_label(node), hint=missing.way_out)


def _check_compute_type(node: ir.Node, target: Target) -> None:
    """Refuse a product in a float type that one of the processors has no product in."""
    row = row_of(node)
    dtype = node.outputs[0].dtype
    if row is None or row.data is None or dtype is None or not target.processors:
        return
    without = [one.name for one in target.processors if dtype.name not in one.compute_types]
    if without:
        message = f"{', '.join(without)} has no {node.op_type} in {dtype.name}"
        hint = "compute in float16, or name other processors in --target"
        raise TargetError(message, where=node_label(node), hint=hint)


def _unfit(node: ir.Node, target: Target) -> str:
    """Return which processor does not have the quantized types of a node, "" if all have."""
    for value in (*node.inputs, *node.outputs):
        name = value.dtype.name if value is not None and value.dtype is not None else ""
        if name not in _ALL_CODES or not is_op(node, "QuantizeLinear", "DequantizeLinear"):
            continue
        without = without_type(target.processors, name)
        if without:
            return f"{', '.join(without)} has no {name}"
    return ""


def _check_rule(node: ir.Node, target: Target, rules: set[str]) -> None:
    facts = node.metadata_props
    if facts.get(SCHEME, FLOAT) != FLOAT and facts.get(RULE) not in rules:
        message = f"its scheme {facts[SCHEME]} was decided by {facts.get(RULE)!r}, "
        message += f"which is no row of the table of {target.title}"
        hint = "run assign-schemes for this target"
        raise TargetError(message, where=node_label(node), hint=hint)


def _op_of(node: ir.Node) -> tuple[str, str]:
    return (standard_domain(node.domain), node.op_type)


def _fault(node: ir.Node, forms: list[LoweredOp]) -> str:
    """Return why no form allows a node, "" if one does; of several, what the last one says."""
    fault = "there is no such op in its table"
    for form in forms:
        fault = (
            _wrong_type(node, form)
            or _wrong_attribute(node, form)
            or broken_demand(node, form.demands)
        )
        if not fault:
            return ""
    return fault


def _wrong_type(node: ir.Node, form: LoweredOp) -> str:
    for index, (value, legal) in enumerate(zip(node.inputs, form.inputs, strict=False)):
        # A type that nobody inferred is left to the runtime.
        if value is None or value.dtype is None or value.dtype.name in legal:
            continue
        return f"input {index} is {value.dtype.name}; legal: {', '.join(legal)}"
    return ""


def _wrong_attribute(node: ir.Node, form: LoweredOp) -> str:
    for legal in form.attributes:
        found = node.attributes.get(legal.name)
        if found is not None and found.as_int() not in legal.values:
            return f"{legal.name} is {found.as_int()}, which has no kernel"
    return ""


def _error(node: ir.Node, target: Target, fault: str) -> QCompilerError:
    message = f"{target.title} does not run it: {fault}"
    maker = node.metadata_props.get(CREATED_BY)
    if maker in target.lowering:
        return InternalError(f"{message}; pass {maker} made it", where=node_label(node))
    return TargetError(
        message,
        where=node_label(node),
        hint="export the model without it, or compile the float model for this target",
    )
