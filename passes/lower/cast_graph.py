"""What must agree on a float type in a graph: terms, and the values between them.

A term is one free choice between float32 and a 16-bit type: what a node computes in, what one
output of an If is, what one carried value of a Loop is. A value has the type of the term that
makes it; a term that reads it in the other type needs a Cast, one for all such readers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir

from qcompiler.ir.dataflow import (
    all_graphs,
    bodies_of,
    constant_of,
    int_attribute,
    is_op,
    standard_opset,
)
from qcompiler.ir.float_types import (
    HEAVY,
    MOVING,
    Place,
    is_control_flow,
    is_float32,
    places_of,
)
from qcompiler.passes.lower.cast_cut import cheapest_division
from qcompiler.quant.compute_type import ComputeType

FLOAT32_TERM: Final = 0
"""The term of every place that is float32 whatever is decided."""
_CAST: Final = 100
"""What a Cast costs. A Cast reads and writes a value once more, and so does a cheap op in float32
that could have been fused in 16 bits: one of them joins an island where that saves a Cast."""
_PENALTY_MOVING: Final = 1
_PENALTY_CHEAP: Final = 60
_PENALTY_HEAVY: Final = 10_000


@dataclass(frozen=True, slots=True)
class Read:
    """One place where a value is read.

    Attributes:
        term: Whose type it is read in.
        owner: The node, or the graph or body that returns the value.
        index: Position among the inputs of the node, or the outputs of the graph.
    """

    term: int
    owner: ir.Node | ir.Graph
    index: int


@dataclass(slots=True)
class Term:
    """One choice of a type.

    Attributes:
        node: The node it belongs to; None for inputs and outputs of the model.
        penalty: What float32 costs.
        values: The values it makes.
    """

    node: ir.Node | None
    penalty: int
    values: list[ir.Value] = field(default_factory=list)


class TypedGraph:
    """The terms of a model and what they make and read; the model is not changed.

    Numbers of terms depend on the order of nodes alone, so that those of a copy are the same.

    Args:
        model: The model; types of its values are inferred.
        compute: The 16-bit type.
        keep_io: Whether inputs and outputs of the model stay float32.

    Attributes:
        model: The model.
        compute: The 16-bit type.
        terms: The terms; number 0 is always float32.
        producer: Term of every float32 value that is not constant.
        reads: Where it is read in a type of its own; a Cast reads any.
        constants: The same for float32 initializers.
        refusals: Why a node has no choice, by node.
        term_of: Term of a node that computes.
    """

    def __init__(self, model: ir.Model, compute: ComputeType, *, keep_io: bool) -> None:
        self.model = model
        self.compute = compute
        self.terms: list[Term] = [Term(None, 0)]
        self.producer: dict[ir.Value, int] = {}
        self.reads: dict[ir.Value, list[Read]] = {}
        self.constants: dict[ir.Value, list[Read]] = {}
        self.refusals: dict[ir.Node, str] = {}
        self.term_of: dict[ir.Node, int] = {}
        self._opset = standard_opset(model)
        self._add_inputs(keep_io=keep_io)
        for graph in all_graphs(model):
            for node in graph:
                if is_control_flow(node):
                    self._add_control_flow(node)
                else:
                    self._add_node(node)
        self._add_outputs(keep_io=keep_io)

    def float32_terms(self, forced: Sequence[int]) -> set[int]:
        """Return the terms that are float32 where as few Casts as can be are wanted.

        Args:
            forced: Terms that must be float32.
        """
        groups = []
        for value, term in self.producer.items():
            members = dict.fromkeys([term, *(read.term for read in self.reads.get(value, ()))])
            if len(members) > 1:
                groups.append(list(members))
        penalties = [term.penalty for term in self.terms]
        return cheapest_division(groups, _CAST, penalties, [FLOAT32_TERM, *forced])

    def neighbours(self, value: ir.Value) -> Iterator[int]:
        """Yield the terms that make and read a value."""
        if value in self.producer:
            yield self.producer[value]
        for read in (*self.reads.get(value, ()), *self.constants.get(value, ())):
            yield read.term

    def _new_term(self, node: ir.Node | None, penalty: int) -> int:
        self.terms.append(Term(node, penalty))
        return len(self.terms) - 1

    def _make(self, value: ir.Value, term: int) -> None:
        if is_float32(value):
            self.producer[value] = term
            self.terms[term].values.append(value)

    def _read(self, value: ir.Value | None, term: int, owner: ir.Node | ir.Graph, at: int) -> None:
        if value is None or not is_float32(value):
            return
        constant = value.is_initializer() and constant_of(value) is not None
        where = self.constants if constant else self.reads
        where.setdefault(value, []).append(Read(term, owner, at))

    def _add_inputs(self, *, keep_io: bool) -> None:
        for value in self.model.graph.inputs:
            # An initializer that callers may override keeps the type of both.
            free = not keep_io and not value.is_initializer()
            self._make(value, self._new_term(None, 1) if free else FLOAT32_TERM)

    def _add_outputs(self, *, keep_io: bool) -> None:
        graph = self.model.graph
        for index, value in enumerate(graph.outputs):
            if keep_io or constant_of(value) is not None:
                self._read(value, FLOAT32_TERM, graph, index)

    def _add_node(self, node: ir.Node) -> None:
        places = places_of(node, self._opset, self.compute)
        if places.reason:
            self.refusals[node] = places.reason
        own = FLOAT32_TERM
        if places.computes:
            own = self.term_of[node] = self._new_term(node, _penalty(node))
        for index, place in places.inputs.items():
            if place is not Place.ANY:
                term = own if place is Place.COMPUTED else FLOAT32_TERM
                self._read(node.inputs[index], term, node, index)
        for index, place in places.outputs.items():
            self._make(node.outputs[index], own if place is Place.COMPUTED else FLOAT32_TERM)
        if node in self.refusals:
            for body in bodies_of(node):
                self._fix(body)

    def _fix(self, body: ir.Graph) -> None:
        """Leave inputs and outputs of the body of an unknown op as they are."""
        for value in body.inputs:
            self._make(value, FLOAT32_TERM)
        for index, value in enumerate(body.outputs):
            self._read(value, FLOAT32_TERM, body, index)

    def _add_control_flow(self, node: ir.Node) -> None:
        for tie in _ties(node):
            values = [*tie.made, *(value for _, _, value in tie.read)]
            if not any(is_float32(value) for value in values):
                continue
            # A tie of which one end has an unknown type, or is a sequence, stays as it is.
            whole = all(is_float32(value) for value in values)
            term = self._new_term(node, _PENALTY_MOVING) if whole else FLOAT32_TERM
            for value in tie.made:
                self._make(value, term)
            for owner, index, value in tie.read:
                self._read(value, term, owner, index)


@dataclass(frozen=True, slots=True)
class _Tie:
    """Values of a control-flow node and its bodies that have one type.

    Attributes:
        made: Outputs of the node and inputs of bodies.
        read: Inputs of the node and outputs of bodies, with who reads them and where.
    """

    made: tuple[ir.Value, ...]
    read: tuple[tuple[ir.Node | ir.Graph, int, ir.Value], ...]


def _ties(node: ir.Node) -> Iterator[_Tie]:
    bodies = list(bodies_of(node))
    if is_op(node, "If"):
        for index, output in enumerate(node.outputs):
            yield _Tie((output,), tuple((body, index, body.outputs[index]) for body in bodies))
        return
    (body,) = bodies
    # A Loop takes the number of iterations and the condition first, and returns the condition.
    first, returned = (2, 1) if is_op(node, "Loop") else (0, 0)
    scanned = int_attribute(node, "num_scan_inputs", 0)
    carried = len(node.inputs) - first - scanned
    for index, inner in enumerate(body.inputs[first:]):
        outer = node.inputs[first + index]
        read: list[tuple[ir.Node | ir.Graph, int, ir.Value]] = []
        if outer is not None:
            read.append((node, first + index, outer))
        made = [inner]
        if index < carried:
            read.append((body, returned + index, body.outputs[returned + index]))
            made.append(node.outputs[index])
        yield _Tie(tuple(made), tuple(read))
    for index in range(carried, len(node.outputs)):
        stacked = body.outputs[returned + index]
        yield _Tie((node.outputs[index],), ((body, returned + index, stacked),))


def _penalty(node: ir.Node) -> int:
    if is_op(node, *MOVING):
        return _PENALTY_MOVING
    return _PENALTY_HEAVY if is_op(node, *HEAVY) else _PENALTY_CHEAP
