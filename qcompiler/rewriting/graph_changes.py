"""What passes did to the nodes of a graph, counted."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.provenance import CREATED_BY
from qcompiler.rewriting.base import Pass, PassResult


@dataclass(frozen=True, slots=True)
class GraphChange:
    """How one pass changed the nodes, those of bodies included.

    Attributes:
        nodes: How many there were afterwards.
        ops: By op type, how many more there were than before; only those that changed.
        removed: Names of nodes that are gone and that no pass had made, in graph order.
    """

    nodes: int
    ops: Mapping[str, int]
    removed: tuple[str, ...]


class CountGraphChanges:
    """Counts nodes around every pass.

    Attributes:
        changes: One entry a pass, in the order they ran.
    """

    def __init__(self) -> None:
        self.changes: list[GraphChange] = []
        self._ops: Counter[str] = Counter()
        self._names: dict[str, None] = {}

    def before_pass(self, model: ir.Model, rewrite: Pass) -> None:
        """Count."""
        nodes = list(all_nodes(model))
        self._ops = Counter(node.op_type for node in nodes)
        names = (node.name for node in nodes if CREATED_BY not in node.metadata_props)
        self._names = dict.fromkeys(name for name in names if name)

    def after_pass(self, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        """Count again, and keep the difference."""
        nodes = list(all_nodes(model))
        ops = Counter(node.op_type for node in nodes)
        difference = {op: ops[op] - self._ops[op] for op in sorted(ops | self._ops)}
        left = {node.name for node in nodes}
        self.changes.append(
            GraphChange(
                len(nodes),
                {op: count for op, count in difference.items() if count},
                tuple(name for name in self._names if name not in left),
            )
        )

    def on_failure(self, rewrite: Pass, error: BaseException) -> str | None:
        """Do nothing."""
        return None
