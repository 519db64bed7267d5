"""Replaces calls of model-local functions by what the functions hold."""

from typing import ClassVar, Final

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass

from qcompiler.errors import ModelError
from qcompiler.ir.dataflow import all_nodes, node_name
from qcompiler.ir.editing import fresh_name, make_value_names_unique
from qcompiler.ir.load import first_cause
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage

# Metadata of a call is handed down to the nodes that replace it, which tells where they came from.
_CALL: Final = "qcompiler.inlined_call"
_INNER: Final = "qcompiler.inlined_node"


class InlineFunctions(Pass):
    """Inline every model-local function, in bodies and in other functions too.

    Before: y = my.domain.f(x), with f(a) => (b) { c = Relu(a); b = Neg(c) }
    After:  c = Relu(x); y = Neg(c), the nodes named after the call: "call/relu", "call/neg".
    Refuses: nothing; a model is turned down with a ModelError when functions call each other in
        a circle, take graphs as attributes, or are written for an opset whose ops mean something
        else than the model's.
    """

    name: ClassVar = "inline-functions"
    consumes: ClassVar = Stage.IMPORTED
    produces: ClassVar = Stage.IMPORTED
    numerics: ClassVar = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Inline all functions.

        Raises:
            ModelError: A function cannot be inlined.
        """
        if not model.functions:
            return PassResult()
        for function in model.functions.values():
            _agree_on_opsets(model, function)
            _give_outputs_nodes(function)
        rewrites = _mark_calls(model)
        try:
            InlinePass()(model)
        except (ValueError, RuntimeError, ir.passes.InvariantError) as error:
            message = f"its functions cannot be inlined: {first_cause(error)}"
            hint = "export the model again without functions (inlined)"
            raise ModelError(message, where=model.graph.name, hint=hint) from error
        RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        _name_inlined(model)
        # InlinePass does not look into bodies it has not reached, so a name it makes may be
        # taken there already.
        make_value_names_unique(model)
        return PassResult(tuple(rewrites) or (Rewrite(self.name, "", "unused functions removed"),))


def _agree_on_opsets(model: ir.Model, function: ir.Function) -> None:
    """Make a function import the opsets of the model, where its ops mean the same in both."""
    used = {node.domain for node in function.all_nodes()}
    for domain, version in list(function.opset_imports.items()):
        ours = model.opset_imports.get(domain, version)
        if domain in used and version != ours:
            for node in function.all_nodes():
                if node.domain == domain and not _same_op(node, version, ours):
                    message = (
                        f"function {function.name} uses {node.op_type} of opset {version}, and "
                        f"the model imports opset {ours}, where it is defined differently"
                    )
                    hint = "export the model again with one opset, or inlined"
                    raise ModelError(message, where=function.name, hint=hint)
        function.opset_imports[domain] = ours


def _same_op(node: ir.Node, version: int, other: int) -> bool:
    try:
        first = onnx.defs.get_schema(node.op_type, version, node.domain)
        second = onnx.defs.get_schema(node.op_type, other, node.domain)
    except onnx.defs.SchemaError:
        return False
    return bool(first.since_version == second.since_version)


def _give_outputs_nodes(function: ir.Function) -> None:
    """Let every output of a function have a node of its own.

    InlinePass renames what a function returns to what the caller calls it. Were that an input
    of the function, an input of the model would change its name.
    """
    seen: set[ir.Value] = set(function.inputs)
    for index, value in enumerate(list(function.outputs)):
        if value in seen:
            identity = ir.node("Identity", [value])
            function.append(identity)
            function.outputs[index] = identity.outputs[0]
        seen.add(value)


def _mark_calls(model: ir.Model) -> list[Rewrite]:
    """Mark the calls and the nodes of functions, and give every call all outputs."""
    rewrites: list[Rewrite] = []
    for function in model.functions.values():
        for node in function.all_nodes():
            node.metadata_props[_INNER] = node.name or node.op_type
            _complete_outputs(model, node)
    for node in all_nodes(model):
        called = model.functions.get(node.op_identifier())
        if called is not None:
            node.metadata_props[_CALL] = node_name(node)
            _complete_outputs(model, node)
            rewrites.append(
                Rewrite("inline-functions", node_name(node), f"{called.domain}::{called.name}")
            )
    return rewrites


def _complete_outputs(model: ir.Model, node: ir.Node) -> None:
    called = model.functions.get(node.op_identifier())
    if called is not None and len(node.outputs) < len(called.outputs):
        node.resize_outputs(len(called.outputs))


def _name_inlined(model: ir.Model) -> None:
    taken = {
        node.name for node in all_nodes(model) if node.name and _CALL not in node.metadata_props
    }
    for node in all_nodes(model):
        inner = node.metadata_props.pop(_INNER, None)
        call = node.metadata_props.pop(_CALL, None)
        if call is not None:
            node.name = fresh_name(f"{call}/{inner or node.op_type}", taken)
