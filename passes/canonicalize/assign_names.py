"""Gives every node and value a name of its own."""

from typing import ClassVar

import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes, node_name
from qcompiler.ir.editing import fresh_name, make_value_names_unique, record_origin
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage


class AssignNames(Pass):
    """Name every node, and rename what shares a name, across the main graph and all bodies.

    Before: two nodes called "fc", and a Relu without a name that computes "h"
    After:  "fc", "fc_2" (its origin is recorded as "fc") and "Relu_h"
    Refuses: nothing. The first node of a name keeps it, as users exclude nodes by name; so do
        inputs and outputs of the model.
    """

    name: ClassVar = "assign-names"
    consumes: ClassVar = Stage.IMPORTED
    produces: ClassVar = Stage.IMPORTED
    numerics: ClassVar = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Name values first, as names of nodes are derived from them."""
        rewrites = [
            Rewrite(self.name, value.name or "", f"value, formerly {former!r}")
            for value, former in make_value_names_unique(model)
        ]
        taken = {node.name for node in all_nodes(model) if node.name}
        seen: set[str] = set()
        for node in all_nodes(model):
            if node.name and node.name not in seen:
                seen.add(node.name)
                continue
            former = node.name or ""
            if former:
                record_origin(node, former)
            node.name = fresh_name(node_name(node), taken)
            seen.add(node.name)
            rewrites.append(Rewrite(self.name, node.name, f"formerly {former!r}"))
        return PassResult(tuple(rewrites))
