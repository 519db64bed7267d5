"""Copies of parts of a graph beside the original, in one graph that computes the rest once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.dataflow import bodies_of, inputs_with_captures
from qcompiler.ir.editing import constant_value, value_names, values_of
from qcompiler.ir.quantizable import find_sites
from qcompiler.ir.weights import reinterpret


@dataclass(frozen=True, slots=True)
class Branch:
    """Copies of some ops and of what depends on them.

    Attributes:
        nodes: The copies of the ops, bodies included, in graph order.
        values: What stands for values of the model in the branch, by their names there.
    """

    nodes: tuple[ir.Node, ...]
    values: Mapping[str, ir.Value]


class BranchedModel:
    """A copy of a model that branches are added to.

    Args:
        model: The model; not changed, and its weights are shared.

    Attributes:
        model: The copy, with the branches in it. Its outputs are those of the model.
        values: The values of the main graph of the copy, those of branches left out, by name.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        graph = self.model.graph
        self.values = {value.name or "": value for value in values_of(graph)}
        self._order = list(graph)
        self._owner: dict[str, ir.Node] = {}
        for node in graph:
            for inner in (node, *(inner for body in bodies_of(node) for inner in body.all_nodes())):
                self._owner[inner.name or ""] = node
        self._read = {node: inputs_with_captures(node) for node in self._order}
        self._weights: dict[str, list[ir.Value]] = {}
        self._above: dict[str, list[ir.Node]] = {}
        for site in find_sites(self.model)[0]:
            name = site.node.name or ""
            self._weights.setdefault(name, []).append(site.weight)
            self._above.setdefault(name, []).extend(site.transposes)
        self._taken = value_names(self.model)
        self._count = 0

    def add(self, ops: Sequence[str], places: Sequence[str]) -> Branch:
        """Copy some ops, and what depends on them, up to some values.

        The copies read weights of their own, which are the same tensors, and share everything
        else with the model.

        Args:
            ops: Names of the ops, which may lie in bodies.
            places: Names of values of the main graph. Those that do not depend on the ops are
                not copied.
        """
        prefix = self._free_prefix()
        seeds = {self._owner[name] for name in ops}
        seeds |= {self._owner[n.name or ""] for name in ops for n in self._above.get(name, [])}
        wanted = [self.values[name] for name in places]
        nodes = self._between(seeds, {self._owner[name] for name in ops}, wanted)
        made = {value for node in nodes for value in node.outputs}
        ends = [value for value in wanted if value in made]
        outside = dict.fromkeys(v for node in nodes for v in self._read[node] if v not in made)
        own = {weight for name in ops for weight in self._weights.get(name, [])}
        copies = self._copy(nodes, list(outside), ends, own, prefix)
        names = {prefix + name for name in ops}
        found = [
            inner
            for node in copies
            for inner in (node, *(n for body in bodies_of(node) for n in body.all_nodes()))
            if inner.name in names
        ]
        by_name = {value.name: value for node in copies for value in node.outputs}
        stand_ins = {v.name or "": by_name[prefix + (v.name or "")] for v in ends}
        return Branch(tuple(found), stand_ins)

    def _free_prefix(self) -> str:
        while True:
            prefix = f"branch{self._count}:"
            self._count += 1
            if not any(name.startswith(prefix) for name in self._taken):
                return prefix

    def _between(
        self, seeds: set[ir.Node], ops: set[ir.Node], ends: Sequence[ir.Value]
    ) -> list[ir.Node]:
        """Return the seeds and what depends on the ops, as far as the ends depend on it."""
        after: set[ir.Node] = set()
        changed: set[ir.Value] = set()
        for node in self._order:
            if node in ops or any(value in changed for value in self._read[node]):
                after.add(node)
                changed.update(node.outputs)
        after |= seeds
        needed: set[ir.Node] = set()
        pending = list(ends)
        while pending:
            producer = pending.pop().producer()
            if producer in after and producer not in needed and producer is not None:
                needed.add(producer)
                pending += self._read[producer]
        return [node for node in self._order if node in needed]

    def _copy(
        self,
        nodes: Sequence[ir.Node],
        outside: Sequence[ir.Value],
        ends: Sequence[ir.Value],
        own: set[ir.Value],
        prefix: str,
    ) -> list[ir.Node]:
        graph = self.model.graph
        copy = ir.GraphView(outside, ends, nodes=nodes, name="branch").clone()
        for original, stand_in in zip(outside, list(copy.inputs), strict=True):
            instead = original
            if original in own:
                instead = _twin(original, prefix + (original.name or ""))
                graph.register_initializer(instead)
            stand_in.replace_all_uses_with(instead, replace_graph_outputs=True)
        copy.outputs.clear()
        copies = list(copy)
        copy.remove(copies)
        for node in copies:
            _rename(node, prefix)
        graph.extend(copies)
        return copies


def _twin(weight: ir.Value, name: str) -> ir.Value:
    tensor = weight.const_value
    assert tensor is not None
    twin = constant_value(name, reinterpret(tensor, tensor.dtype, tensor.shape.numpy(), name))
    twin.metadata_props.update(weight.metadata_props)
    return twin


def _rename(node: ir.Node, prefix: str) -> None:
    """Put a prefix before every name that a node defines, in its bodies too."""
    node.name = prefix + (node.name or "")
    for value in node.outputs:
        if value.name:
            value.name = prefix + value.name
    for body in bodies_of(node):
        for value in dict.fromkeys((*body.inputs, *body.initializers.values())):
            value.name = prefix + (value.name or "")
        for inner in body:
            _rename(inner, prefix)
