"""Models that return values from inside a graph, or what the runtime reduces them to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.ir.dataflow import inputs_with_captures, standard_opset
from qcompiler.ir.editing import (
    add_initializer,
    drop_unused_initializers,
    fresh_name,
    remove_node,
    value_names,
    values_of,
)
from qcompiler.ir.shapes import infer_shapes
from qcompiler.quant.selector import nearest


class Measure(StrEnum):
    """What comes out of a tap, always in float32 but for the shape."""

    VALUES = "values"
    """The tensor itself."""
    SHAPE = "shape"
    """Its sizes, int64 `[rank]`."""
    MINIMUM = "minimum"
    MAXIMUM = "maximum"
    SUM = "sum"
    SUM_SQUARES = "sum_squares"


@dataclass(frozen=True, slots=True)
class Tap:
    """One thing to learn about one value.

    Attributes:
        value: Name of a float tensor of the main graph.
        measure: What to return.
        axes: Axes that a reduction removes, ascending; None for all, which gives a scalar.
    """

    value: str
    measure: Measure
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TappedModel:
    """A model with taps.

    Attributes:
        model: Takes the inputs of the original, and returns what is tapped and nothing else.
        outputs: Name of the output that each tap is read from.
    """

    model: ir.Model
    outputs: Mapping[Tap, str]


_REDUCTIONS: Final = {
    Measure.MINIMUM: ("ReduceMin", 18),
    Measure.MAXIMUM: ("ReduceMax", 18),
    Measure.SUM: ("ReduceSum", 13),
    Measure.SUM_SQUARES: ("ReduceSumSquare", 18),
}
"""Operator, and the opset from which on its axes are an input (ONNX changelog)."""


def tap_model(model: ir.Model, taps: Sequence[Tap]) -> TappedModel:
    """Return a copy of a model that computes what is tapped and nothing that is not needed for it.

    The copy shares its weights with the model, which is not changed. Values of other float types
    are cast to float32 in the graph: NumPy and the runtime's reductions know few of them.

    Args:
        model: The model.
        taps: What to return.

    Raises:
        ModelError: A value does not exist, lies in the body of an If, Loop or Scan, or is no
            float tensor.
    """
    check_taps(model, [tap.value for tap in taps])
    copy = model.clone()
    values = {value.name: value for value in values_of(copy.graph)}
    wanted = [values[tap.value] for tap in taps]
    keep_only(copy.graph, wanted)
    if any(value.dtype is None for value in wanted):
        # A value of unknown type would have to be cast, which copies it.
        infer_shapes(copy)
    builder = _TapBuilder(copy)
    place = {name: index for index, name in enumerate(values)}
    # ONNX Runtime orders nodes by a search backwards from those that nobody reads, the last one
    # first. So the taps of early values come last: each then runs as soon as its value is there,
    # and the value need not be kept until the end.
    for tap in sorted(dict.fromkeys(taps), key=lambda tap: place[tap.value], reverse=True):
        builder.add(tap, values[tap.value])
    copy.graph.outputs.extend(builder.outputs)
    return TappedModel(copy, {tap: builder.names[tap] for tap in taps})


def check_taps(model: ir.Model, names: Sequence[str]) -> None:
    """Check that values can be tapped.

    Raises:
        ModelError: As `tap_model` does.
    """
    values = {value.name: value for value in values_of(model.graph) if value.name}
    inside = {
        value.name: body.name for body in model.graph.subgraphs() for value in values_of(body)
    }
    for name in names:
        if name in values:
            _check_type(values[name])
        elif name in inside:
            message = (
                f"lies in the body {inside[name]!r} of an If, Loop or Scan, which runs any number "
                "of times or not at all: nothing in it can be an output of the model"
            )
            raise ModelError(message, where=name, hint="leave the nodes of that body in float")
        else:
            close = ", ".join(nearest(name, [text for text in values if text]))
            message = "the model has no such value"
            raise ModelError(message, where=name, hint=f"nearest: {close or 'none'}")


def _check_type(value: ir.Value) -> None:
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        message = f"is a {value.type}, and only tensors have statistics"
        raise ModelError(message, where=value.name)
    if value.dtype is not None and not value.dtype.is_floating_point():
        message = f"holds {value.dtype}, and only float values have statistics"
        raise ModelError(message, where=value.name)


def keep_only(graph: ir.Graph, wanted: Sequence[ir.Value]) -> None:
    """Remove what is not needed to compute the wanted values; inputs stay."""
    needed: set[ir.Node] = set()
    pending = list(wanted)
    while pending:
        producer = pending.pop().producer()
        if producer is not None and producer not in needed:
            needed.add(producer)
            pending += inputs_with_captures(producer)
    graph.outputs.clear()
    for node in reversed(list(graph)):
        if node not in needed:
            remove_node(node)
    kept = set(wanted)
    drop_unused_initializers([v for v in graph.initializers.values() if v not in kept])


class _TapBuilder:
    """Adds the nodes of taps to a graph.

    Attributes:
        outputs: The values to return, each once.
        names: Name of the output of each tap.
    """

    def __init__(self, model: ir.Model) -> None:
        self.outputs: list[ir.Value] = []
        self.names: dict[Tap, str] = {}
        self._graph = model.graph
        if not standard_opset(model):
            self._graph.opset_imports[""] = max(version for _, version in _REDUCTIONS.values())
        self._opset = standard_opset(model)
        self._taken = value_names(model)
        self._floats: dict[ir.Value, ir.Value] = {}

    def add(self, tap: Tap, value: ir.Value) -> None:
        """Make an output that gives what is tapped."""
        if tap.measure is Measure.SHAPE:
            made = self._node("Shape", [value], "shape", ir.DataType.INT64)
        elif tap.measure is Measure.VALUES:
            made = self._as_float(value)
            if made is value and value.producer() is None:
                # Inputs and weights cannot be outputs themselves.
                made = self._node("Identity", [value], "values")
        else:
            made = self._reduce(tap, self._as_float(value))
        if made not in self.outputs:
            self.outputs.append(made)
        assert made.name
        self.names[tap] = made.name

    def _reduce(self, tap: Tap, value: ir.Value) -> ir.Value:
        op_type, axes_are_input_from = _REDUCTIONS[tap.measure]
        inputs, attributes = [value], {"keepdims": 0}
        if tap.axes is None:
            return self._node(op_type, inputs, tap.measure, attributes=attributes)
        if self._opset < axes_are_input_from:
            return self._node(
                op_type, inputs, tap.measure, attributes={**attributes, "axes": tap.axes}
            )
        name = fresh_name(f"{value.name}:axes", self._taken)
        axes = ir.tensor(np.array(tap.axes, np.int64), name=name)
        inputs.append(add_initializer(self._graph, name, axes))
        return self._node(op_type, inputs, tap.measure, attributes=attributes)

    def _as_float(self, value: ir.Value) -> ir.Value:
        if value.dtype == ir.DataType.FLOAT:
            return value
        if value not in self._floats:
            to = {"to": int(ir.DataType.FLOAT)}
            self._floats[value] = self._node("Cast", [value], "float", attributes=to)
        return self._floats[value]

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        label: str,
        dtype: ir.DataType = ir.DataType.FLOAT,
        attributes: Mapping[str, int | tuple[int, ...]] | None = None,
    ) -> ir.Value:
        name = fresh_name(f"{inputs[0].name}:{label}", self._taken)
        output = ir.Value(name=name, type=ir.TensorType(dtype))
        made = ir.convenience.convert_attributes(dict(attributes or {}))
        self._graph.append(ir.Node("", op_type, inputs, made, outputs=[output], name=name))
        return output
