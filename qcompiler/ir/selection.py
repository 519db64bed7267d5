"""Which nodes a recipe's selector means."""

from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.errors import UsageError
from qcompiler.ir.blocks import Block
from qcompiler.ir.dataflow import all_nodes, inputs_with_captures
from qcompiler.ir.provenance import origins_of
from qcompiler.quant.selector import Selector, nearest


class SelectionIndex:
    """Answers whether a selector means a node of one model.

    Args:
        model: The model.
        blocks: Its blocks; may be empty when no selector speaks of blocks.
    """

    def __init__(self, model: ir.Model, blocks: Sequence[Block]) -> None:
        self._model = model
        self._block_of = {node: block.index for block in blocks for node in block.nodes}
        self._between: dict[tuple[str, str], frozenset[ir.Node]] = {}

    def selects(self, selector: Selector, node: ir.Node) -> bool:
        """Return whether every part of the selector holds for the node.

        Raises:
            UsageError: `between` names a value that does not exist.
        """
        if selector.name is not None and not _is_named(selector, node):
            return False
        if selector.op_type is not None and selector.op_type != node.op_type:
            return False
        if selector.blocks is not None and self._block_of.get(node) not in selector.blocks:
            return False
        return selector.between is None or node in self._on_path(selector.between)

    def nodes(self, selector: Selector, where: str) -> list[ir.Node]:
        """Return all nodes that a selector means.

        Args:
            selector: The selector.
            where: What messages call the place that it comes from.

        Raises:
            UsageError: There are none; the message has the nearest names.
        """
        found = [node for node in all_nodes(self._model) if self.selects(selector, node)]
        if found:
            return found
        names = [name for node in all_nodes(self._model) for name in origins_of(node)]
        close = nearest(selector.name, names) if selector.name else []
        message = f"{selector} means no node"
        hint = f"nearest: {', '.join(close)}" if close else "`qcompile inspect` lists the names"
        raise UsageError(message, where=where, hint=hint)

    def _on_path(self, ends: tuple[str, str]) -> frozenset[ir.Node]:
        if ends not in self._between:
            first, last = (self._value(name) for name in ends)
            after = _reach_forward(self._model, first)
            before = _reach_backward(last)
            self._between[ends] = frozenset(after & before)
        return self._between[ends]

    def _value(self, name: str) -> ir.Value:
        values = {value.name: value for value in self._model.graph.inputs}
        for node in all_nodes(self._model):
            values.update({value.name: value for value in node.outputs})
        if name not in values:
            close = nearest(name, [text for text in values if text])
            message = f"the model has no value {name!r}"
            raise UsageError(message, where="recipe: between", hint=f"nearest: {', '.join(close)}")
        return values[name]


def _is_named(selector: Selector, node: ir.Node) -> bool:
    """Whether the pattern fits the node's name or that of a source node it stands for."""
    names = dict.fromkeys((node.name or "", *origins_of(node)))
    return any(selector.matches_name(name) for name in names)


def _reach_forward(model: ir.Model, start: ir.Value) -> set[ir.Node]:
    reached: set[ir.Node] = set()
    alive: set[ir.Value] = {start}
    for node in model.graph:
        if any(value in alive for value in inputs_with_captures(node)):
            reached.add(node)
            alive.update(node.outputs)
    return reached


def _reach_backward(end: ir.Value) -> set[ir.Node]:
    reached: set[ir.Node] = set()
    pending = [end]
    while pending:
        producer = pending.pop().producer()
        if producer is not None and producer not in reached:
            reached.add(producer)
            pending.extend(inputs_with_captures(producer))
    return reached
