"""Which nodes work on quantized activations, given those that multiply by quantized weights.

Starting from every node that has a rule in the target's placement table, nodes are dropped until
each that is left has a reason to stay: a node that only follows or moves values must read what
another one computed in integers, and somebody must read its own result in integers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompiler.ir.dataflow import constant_of, standard_domain
from qcompiler.ir.provenance import scheme_of
from qcompiler.quant.scheme import Activations
from qcompiler.targets.placement import Part, Placement, PlacementRule
from qcompiler.targets.rows import LegalAttribute


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A value that is to be quantized.

    Attributes:
        value: The value.
        shares: The value whose scale it has, None for one of its own.
    """

    value: ir.Value
    shares: ir.Value | None


@dataclass(slots=True)
class IntegerRegions:
    """The nodes of the main graph that work on quantized activations.

    Attributes:
        members: Their rules, in graph order.
        refused: Nodes that have a rule or lie between members, and why they stay in float.
    """

    placement: Placement
    members: dict[ir.Node, PlacementRule] = field(default_factory=dict)
    refused: dict[ir.Node, str] = field(default_factory=dict)

    def reads(self, node: ir.Node) -> tuple[int, ...]:
        """Return the positions of the inputs that a member reads quantized."""
        rule = self.members[node]
        if rule.part is Part.VANISHES:
            return ()
        if rule.part is Part.JOINS:
            return self._other_branch(node, rule)
        return _data_positions(node, rule)

    def quantizers(self) -> Iterator[Quantizer]:
        """Yield the values that are to be quantized, in the order in which they are computed."""
        found: dict[ir.Value, None] = {}
        for node in self.members:
            for index in self.reads(node):
                value = node.inputs[index]
                assert value is not None
                found.setdefault(value)
            found.update(dict.fromkeys(self._emitted(node)))
        for value in found:
            producer = value.producer()
            rule = self.members.get(producer) if producer is not None else None
            shares = None
            if producer is not None and rule is not None and rule.part is Part.CARRIES:
                shares = producer.inputs[0]
            yield Quantizer(value, shares)

    def regions(self) -> dict[ir.Node, int]:
        """Number the stretches of members that hand each other quantized values, from 0."""
        root: dict[ir.Node, ir.Node] = {node: node for node in self.members}

        def find(node: ir.Node) -> ir.Node:
            while root[node] is not node:
                root[node] = root[root[node]]
                node = root[node]
            return node

        for node in self.members:
            for output in node.outputs:
                for use in output.uses():
                    if use.node in self.members and self._hands_over(node, use.node, use.idx):
                        root[find(use.node)] = find(node)
        numbers: dict[ir.Node, int] = {}
        return {node: numbers.setdefault(find(node), len(numbers)) for node in self.members}

    def emits(self, value: ir.Value) -> bool:
        """Whether a member computes a value as codes."""
        producer = value.producer()
        return producer in self.members and value in self._emitted(producer)

    def _hands_over(self, node: ir.Node, reader: ir.Node, index: int) -> bool:
        if self.members[reader].part is Part.VANISHES:
            return True
        return index in self.reads(reader) and any(self.emits(value) for value in node.outputs)

    def _emitted(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """Return the outputs of a member that leave it as codes."""
        rule = self.members[node]
        if rule.part is Part.CARRIES:
            return tuple(value for value in node.outputs if value.name)
        output = node.outputs[0]
        if self._vanishing_reader(output) is not None:
            return ()
        must = rule.output or rule.part is Part.VANISHES
        return (output,) if must or self._is_wanted(output) else ()

    def _vanishing_reader(self, value: ir.Value) -> ir.Node | None:
        for use in value.uses():
            rule = self.members.get(use.node)
            if rule is not None and rule.part is Part.VANISHES:
                return use.node
        return None

    def _is_wanted(self, value: ir.Value) -> bool:
        return any(
            use.node in self.members and use.idx in self.reads(use.node) for use in value.uses()
        )

    def _other_branch(self, node: ir.Node, rule: PlacementRule) -> tuple[int, ...]:
        """Return the position that is not the sums of an op beside a joining one, () for none.

        Where both are sums, those that are computed last stay as they are.
        """
        if len(node.inputs) != 2:
            return ()
        order = {member: place for place, member in enumerate(self.members)}
        producers = [self._summed_by(value, rule) for value in node.inputs]
        summed = [
            (order[producer], index)
            for index, producer in enumerate(producers)
            if producer is not None
        ]
        return (1 - max(summed)[1],) if summed else ()

    def joined(self, node: ir.Node) -> ir.Node | None:
        """Return the op to whose sums a member that joins adds the branch it reads as codes."""
        rule = self.members[node]
        read = self.reads(node) if rule.part is Part.JOINS else ()
        return self._summed_by(node.inputs[1 - read[0]], rule) if read else None

    def _summed_by(self, value: ir.Value | None, rule: PlacementRule) -> ir.Node | None:
        """Return the op beside a joining one that computes a value for it alone."""
        producer = value.producer() if value is not None else None
        if value is None or producer is None or producer not in self.members:
            return None
        op = (standard_domain(producer.domain), producer.op_type)
        alone = len(value.uses()) == 1 and not value.is_graph_output()
        return producer if op in rule.beside and alone else None

    def complaint(self, node: ir.Node) -> str:
        """Say why a member cannot stay one, "" if it can."""
        return _COMPLAINTS[self.members[node].part](self, node)

    def _computes(self, node: ir.Node) -> str:
        return ""

    def _follows(self, node: ir.Node) -> str:
        for index in self.reads(node):
            value = node.inputs[index]
            if value is None or constant_of(value) is not None:
                return "one of its inputs is a constant in float"
            if not self.emits(value):
                return f"its input {value.name} is computed in float, and quantizing it costs more"
            if self.members[node].part is Part.FOLLOWS and not self._must_be_codes(value):
                return f"its input {value.name} comes from a product that can return it in float"
        return self._unwanted(node)

    def _must_be_codes(self, value: ir.Value) -> bool:
        """Whether a value is there as codes anyway, since the kernel behind it has no other form.

        A product that can return float loses accuracy, and gains little, by rounding its result
        for the sake of an Add or Mul; in transformers such values span many orders of magnitude.
        """
        producer = value.producer()
        while producer in self.members:
            rule = self.members[producer]
            if rule.part not in (Part.CARRIES, Part.VANISHES):
                return rule.part is Part.FOLLOWS or rule.output
            source = producer.inputs[0]
            producer = source.producer() if source is not None else None
        return False

    def _unwanted(self, node: ir.Node) -> str:
        output = node.outputs[0]
        reader = self._vanishing_reader(output)
        tail = output if reader is None else reader.outputs[0]
        if any(self._is_wanted(value) for value in (tail, *node.outputs)):
            return ""
        return "nothing that works on integers reads its result"

    def _joins(self, node: ir.Node) -> str:
        read = self.reads(node)
        if not read:
            beside = ", ".join(op for _, op in self.members[node].beside)
            return f"it adds no sums of a {beside} on quantized values"
        if constant_of(node.inputs[read[0]]) is not None:
            return "one of its inputs is a constant in float"
        return ""

    def _vanishes(self, node: ir.Node) -> str:
        source = node.inputs[0]
        head = source.producer() if source is not None else None
        rule = self.members.get(head) if head is not None else None
        if source is None or rule is None or rule.part in (Part.CARRIES, Part.VANISHES):
            return "no integer kernel computes what it clips"
        if len(source.uses()) > 1 or source.is_graph_output():
            return f"{source.name} is read by others too, before it is clipped"
        return "" if _clips_at_zero(node) else "codes end at 0 only, and it clips elsewhere"


_COMPLAINTS: dict[Part, Callable[[IntegerRegions, ir.Node], str]] = {
    Part.COMPUTES: IntegerRegions._computes,
    Part.FOLLOWS: IntegerRegions._follows,
    Part.CARRIES: IntegerRegions._follows,
    Part.JOINS: IntegerRegions._joins,
    Part.VANISHES: IntegerRegions._vanishes,
}


def find_regions(model: ir.Model, placement: Placement) -> IntegerRegions:
    """Find the nodes of the main graph that work on quantized activations.

    Only nodes whose scheme has static activations compute; others have no scheme of their own.
    """
    regions = IntegerRegions(placement)
    for node in model.graph:
        rule = _candidate(node, placement)
        if rule is not None:
            regions.members[node] = rule
    changed = True
    while changed:
        changed = False
        for node in list(regions.members):
            complaint = regions.complaint(node)
            if complaint:
                regions.refused[node] = complaint
                del regions.members[node]
                changed = True
    _explain_neighbours(model.graph, regions)
    return regions


def _candidate(node: ir.Node, placement: Placement) -> PlacementRule | None:
    mode = node.attributes.get("mode")
    text = mode.as_string() if mode is not None and mode.type == ir.AttributeType.STRING else None
    op = (standard_domain(node.domain), node.op_type)
    rule = placement.rule_for(op, "nearest" if op == ("", "Resize") and text is None else text)
    if rule is None or not all(_is_legal(node, entry) for entry in rule.attributes):
        return None
    if rule.part is Part.COMPUTES:
        scheme = scheme_of(node)
        return rule if scheme and scheme.activations is Activations.STATIC else None
    values = [node.inputs[index] for index in _data_positions(node, rule)]
    values += [value for value in node.outputs if value.name]
    floats = all(
        value is not None and value.dtype is not None and value.dtype.name in placement.float_types
        for value in values
    )
    return rule if floats else None


def _is_legal(node: ir.Node, entry: LegalAttribute) -> bool:
    attribute = node.attributes.get(entry.name)
    if attribute is None:
        return True
    several = attribute.type == ir.AttributeType.INTS
    values = attribute.as_ints() if several else (attribute.as_int(),)
    return all(value in entry.values for value in values)


def _clips_at_zero(node: ir.Node) -> bool:
    """Whether a Relu or Clip stops at 0, where the codes of what it returns begin.

    ONNX Runtime removes a Clip whose bounds are constants that contain the range of the codes. A
    range that ends elsewhere than at 0 is not met exactly: its zero point is rounded.
    """
    if node.op_type == "Relu":
        return True
    lower = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    upper = node.inputs[2] if len(node.inputs) > 2 else None
    if lower is None or float(lower.numpy()) != 0.0:
        return False
    return upper is None or constant_of(upper) is not None


def _data_positions(node: ir.Node, rule: PlacementRule) -> tuple[int, ...]:
    if rule.data is None:
        return tuple(index for index, value in enumerate(node.inputs) if value is not None)
    return rule.data


def _explain_neighbours(graph: ir.Graph, regions: IntegerRegions) -> None:
    """Say of ops without a rule why they stay in float, where they read what members compute."""
    for node in graph:
        if node in regions.members or node in regions.refused:
            continue
        if not any(value is not None and regions.emits(value) for value in node.inputs):
            continue
        entry = regions.placement.reluctance_for((standard_domain(node.domain), node.op_type))
        if entry is not None:
            regions.refused[node] = entry.reason
