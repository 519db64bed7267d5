"""Following scaled channels through a graph, until every value they reach is accounted for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.ir.channels.classes import ChannelClasses, Ids, merged_along
from qcompiler.ir.channels.reshaping import Extent
from qcompiler.ir.dataflow import constant_of, node_label, standard_domain
from qcompiler.ir.quantizable import FLOAT_TYPES, Site
from qcompiler.ir.weights import read_all

OpKey = tuple[str, str]
"""Domain ("" for the standard one) and op type."""


class CannotScaleError(Exception):
    """An op does not commute with a scale; the message says why, as a clause about the op."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value meets a node.

    Attributes:
        node: The node.
        index: Position among its inputs or outputs.
        is_output: Whether the node computes the value.
    """

    node: ir.Node
    index: int
    is_output: bool


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A constant that takes up the scale of some channels.

    Attributes:
        node: The node that reads it.
        index: At which of its inputs.
        value: The initializer; where Transposes lie between it and the node, what they read.
        ids: Channel of each element, of a shape that broadcasts with the tensor's.
        power: 1 where the constant is multiplied by the scale (it meets values that were divided
            by it), -1 where it is divided.
    """

    node: ir.Node
    index: int
    value: ir.Value
    ids: Ids
    power: int


class Tracer:
    """Finds everything that must change when the channels of one value are scaled.

    A scaled value makes demands on the node that computes it and on all that read it: each either
    has a constant that takes the scale up, or hands the demand to its other values, or cannot, and
    then the channels are fixed. What is left is exact, since no reader or writer was left out.

    Args:
        relations: What each op demands of its other values when one is scaled.
        sites: Ops with weights, and which input that is.
    """

    def __init__(
        self, relations: Mapping[OpKey, "Relation"], sites: Mapping[ir.Node, Sequence[Site]]
    ) -> None:
        self.classes = ChannelClasses()
        self.layouts: dict[ir.Value, Ids] = {}
        self.factors: dict[tuple[ir.Node, int, int], Factor] = {}
        self.sites = sites
        self.relations = relations
        self._waiting: list[ir.Value] = []

    def run(self) -> None:
        """Follow what was given, until nothing is left to follow."""
        while self._waiting:
            value = self._waiting.pop()
            ids = self.layouts[value]
            if np.all(self.classes.is_fixed(ids)):
                continue
            if value.is_graph_input() or value.is_initializer():
                self.fix(ids, f"{value.name} is an input of the model or of a body")
            if value.is_graph_output():
                self.fix(ids, f"{value.name} is an output of the model or of a body")
            producer = value.producer()
            if producer is not None:
                self.visit(Place(producer, value.index() or 0, is_output=True), ids)
            for use in value.uses():
                self.visit(Place(use.node, use.idx, is_output=False), ids)

    def give(self, value: ir.Value | None, ids: Ids) -> None:
        """Say which channels a value has; they are fixed where its shape does not tell enough."""
        if value is None:
            return
        try:
            ids = self._fitted(value, ids)
        except CannotScaleError as error:
            self.fix(ids, str(error))
            return
        known = self.layouts.get(value)
        if known is not None:
            self.classes.unite(known, ids)
            return
        self.layouts[value] = ids
        self._waiting.append(value)

    def give_operand(self, node: ir.Node, index: int, ids: Ids) -> None:
        """Say which channels an input of a node has: a constant is divided by their scale."""
        value = node.inputs[index]
        if value is not None and constant_of(value) is not None:
            self.scale(node, index, ids, power=-1)
        else:
            self.give(value, ids)

    def scale(self, node: ir.Node, index: int, ids: Ids, *, power: int) -> None:
        """Scale a constant that a node reads; shapes broadcast as in the op.

        The channels are fixed where it is no constant float initializer.
        """
        value = node.inputs[index]
        tensor = constant_of(value)
        floats = tensor is not None and tensor.dtype in FLOAT_TYPES
        if value is None or tensor is None or not floats or not value.is_initializer():
            name = "" if value is None else value.name
            self.fix(ids, f"{node_label(node)} reads {name}, which is computed at run time")
            return
        if tensor.size == 1 and _stays_itself(tensor):
            return
        while ids.ndim > len(tensor.shape) and ids.shape[0] == 1:
            ids = ids[0]
        self.add_factor(Factor(node, index, value, ids, power))

    def add_factor(self, factor: Factor) -> None:
        """Note a constant that takes up a scale; what is known of it already is made to agree."""
        key = (factor.node, factor.index, factor.power)
        known = self.factors.setdefault(key, factor)
        if known is not factor:
            self.classes.unite(known.ids, factor.ids)

    def confined(self, ids: Ids, axes: Sequence[int]) -> Ids:
        """Return ids that vary along some axes only; channels along others become one."""
        kept = {axis % ids.ndim for axis in axes}
        return merged_along(
            self.classes, ids, [axis for axis in range(ids.ndim) if axis not in kept]
        )

    def fix(self, ids: Ids, reason: str) -> None:
        """Say that channels cannot be scaled."""
        self.classes.fix(ids, reason)

    def visit(self, place: Place, ids: Ids) -> None:
        """Ask a node for what it demands where a scaled value meets it."""
        node = place.node
        relation = self.relations.get((standard_domain(node.domain), node.op_type))
        try:
            (relation or _no_relation)(self, place, ids)
        except CannotScaleError as error:
            verb = "computes" if place.is_output else "reads"
            reached = node.outputs[place.index] if place.is_output else node.inputs[place.index]
            name = "" if reached is None else reached.name
            self.fix(ids, f"{node_label(node)} {verb} {name}: {error}")

    def _fitted(self, value: ir.Value, ids: Ids) -> Ids:
        """Return ids of the rank of a value, merged along axes where it has a single position."""
        shape = extents_of(value)
        if shape is None:
            message = f"the shape of {value.name} is not known"
            raise CannotScaleError(message)
        if ids.ndim > len(shape):
            lead = range(ids.ndim - len(shape))
            ids = merged_along(self.classes, ids, lead).reshape(ids.shape[len(lead) :])
        ids = ids.reshape([1] * (len(shape) - ids.ndim) + list(ids.shape))
        ids = merged_along(self.classes, ids, [a for a, size in enumerate(shape) if size == 1])
        for axis, size in enumerate(shape):
            if ids.shape[axis] not in (1, size):
                message = f"axis {axis} of {value.name} has no fixed extent"
                raise CannotScaleError(message)
        return ids


Relation = Callable[[Tracer, Place, Ids], None]
"""What a node asks of its other values when one of them has channels."""


def _no_relation(_tracer: Tracer, place: Place, _ids: Ids) -> None:
    message = f"{place.node.op_type} does not commute with a scale"
    raise CannotScaleError(message)


def extents_of(value: ir.Value | None) -> list[Extent] | None:
    """Return the extents of a value, None where not even its rank is known."""
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]


def _stays_itself(tensor: ir.TensorProtocol) -> bool:
    """Whether a scalar is 0 or infinite, which no factor changes."""
    number = float(read_all(tensor).reshape(-1)[0])
    return number == 0.0 or np.isinf(number)
