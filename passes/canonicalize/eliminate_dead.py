"""Removes what no output of the model depends on."""

from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from qcompiler.ir.dataflow import ONNX_DOMAINS, all_graphs, all_nodes, bodies_of, node_name
from qcompiler.ir.editing import is_used, remove_node
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage


class EliminateDead(Pass):
    """Remove nodes, initializers, functions and opset imports that nothing needs.

    Before: y = Relu(x); z = Exp(x); only y is an output
    After:  y = Relu(x)
    Refuses: nothing. Graph inputs stay, used or not, and so do defaults of inputs.
    """

    name: ClassVar = "eliminate-dead"
    consumes: ClassVar = Stage.IMPORTED
    produces: ClassVar = Stage.IMPORTED
    numerics: ClassVar = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Remove all dead parts in one go, from the outputs backwards."""
        # onnx_ir's pass keeps alive what a dead If read from outside, and initializers of bodies.
        rewrites = _remove_nodes(model.graph)
        rewrites += _remove_initializers(model)
        rewrites += _remove_functions(model)
        rewrites += _remove_opsets(model)
        return PassResult(tuple(rewrites))


def _remove_nodes(graph: ir.Graph) -> list[Rewrite]:
    """Remove dead nodes, last first, as each may free what comes before it."""
    rewrites: list[Rewrite] = []
    for node in reversed(list(graph)):
        if not any(is_used(output) for output in node.outputs):
            rewrites.append(Rewrite("eliminate-dead", node_name(node), node.op_type))
            remove_node(node)
            continue
        for body in bodies_of(node):
            rewrites.extend(_remove_nodes(body))
    return rewrites


def _remove_initializers(model: ir.Model) -> list[Rewrite]:
    rewrites: list[Rewrite] = []
    for graph in all_graphs(model):
        for name, value in list(graph.initializers.items()):
            if not is_used(value) and not value.is_graph_input():
                del graph.initializers[name]
                rewrites.append(Rewrite("eliminate-dead", name, "initializer"))
    return rewrites


def _remove_functions(model: ir.Model) -> list[Rewrite]:
    before = [f"{function.domain}::{function.name}" for function in model.functions.values()]
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    after = {f"{function.domain}::{function.name}" for function in model.functions.values()}
    return [Rewrite("eliminate-dead", name, "function") for name in before if name not in after]


def _remove_opsets(model: ir.Model) -> list[Rewrite]:
    used = {node.domain for node in all_nodes(model)}
    for function in model.functions.values():
        used.add(function.domain)
        used.update(node.domain for node in function.all_nodes())
    # The standard domain may be imported under either of its names, and is never dropped.
    dead = [name for name in model.opset_imports if name not in used and name not in ONNX_DOMAINS]
    for name in dead:
        del model.opset_imports[name]
    return [Rewrite("eliminate-dead", name, "opset import") for name in dead]
