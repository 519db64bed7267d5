"""Scaled channels through ops that work on each element alone."""

from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.ir.channels.classes import Ids
from qcompiler.ir.channels.tracer import (
    CannotScaleError,
    OpKey,
    Place,
    Relation,
    Tracer,
    extents_of,
)
from qcompiler.ir.dataflow import constant_of, is_op, standard_domain
from qcompiler.ir.quantizable import FLOAT_TYPES
from qcompiler.ir.weights import read_all


def _ignored(_tracer: Tracer, place: Place, _ids: Ids) -> None:
    """A positive scale of what the op reads changes nothing of what it returns."""
    if place.is_output:
        message = f"what {place.node.op_type} returns does not follow the scale of what it reads"
        raise CannotScaleError(message)


def _unary(tracer: Tracer, place: Place, ids: Ids) -> None:
    node = place.node
    if place.is_output:
        tracer.give(node.inputs[0], ids)
    elif place.index == 0:
        tracer.give(node.outputs[0], ids)
    else:
        message = "the scaled value is a parameter of the op"
        raise CannotScaleError(message)


def _cast(tracer: Tracer, place: Place, ids: Ids) -> None:
    value = place.node.outputs[0]
    source = place.node.inputs[0]
    types = {value.dtype, None if source is None else source.dtype}
    if not types <= {*FLOAT_TYPES, ir.DataType.DOUBLE}:
        message = "it casts to or from something else than a float"
        raise CannotScaleError(message)
    _unary(tracer, place, ids)


def _clip(tracer: Tracer, place: Place, ids: Ids) -> None:
    bounds = [constant_of(value) for value in place.node.inputs[1:] if value is not None]
    for tensor in bounds:
        number = None if tensor is None else float(read_all(tensor).reshape(-1)[0])
        if number is None or not (number == 0.0 or np.isinf(number)):
            limit = "a computed bound" if number is None else f"{number:g}"
            message = (
                f"it cuts at {limit}, which would be another bound in each channel; exact is only "
                "a Clip at 0, that is a Relu"
            )
            raise CannotScaleError(message)
    if place.node.attributes.get("max") is not None or place.node.attributes.get("min") is not None:
        message = "its bounds are attributes of an old operator set"
        raise CannotScaleError(message)
    _unary(tracer, place, ids)


def _joined(tracer: Tracer, place: Place, ids: Ids) -> None:
    """All operands and the result are scaled alike: Add, Max, Where and the like."""
    node = place.node
    first = 1 if is_op(node, "Where") else 0
    if not place.is_output and place.index < first:
        message = "the scaled value is a condition"
        raise CannotScaleError(message)
    tracer.give(node.outputs[0], ids)
    whole = tracer.layouts.get(node.outputs[0], ids)
    for index in range(first, len(node.inputs)):
        if node.inputs[index] is not None:
            tracer.give_operand(node, index, whole)


def _product(tracer: Tracer, place: Place, ids: Ids) -> None:
    """Of a product, one factor is scaled; of a quotient the numerator, or the other by 1/s."""
    node = place.node
    quotient = is_op(node, "Div")
    constant = _vector_operand(node, ids)
    if place.is_output:
        if constant is not None:
            tracer.scale(node, constant, ids, power=1 if quotient and constant == 1 else -1)
            return
        index = 0 if quotient else _carrier(tracer, node, ids)
        tracer.give_operand(node, index, ids)
        return
    other = node.inputs[1 - place.index]
    if quotient and place.index == 1:
        message = "the scaled value is a divisor"
        raise CannotScaleError(message)
    if other is node.inputs[place.index]:
        message = "it multiplies the value by itself"
        raise CannotScaleError(message)
    if constant is not None and constant == 1 - place.index:
        tracer.scale(node, constant, ids, power=-1 if quotient else 1)
        return
    if other in tracer.layouts:
        message = f"both of its operands would be scaled, {other.name if other else ''} too"
        raise CannotScaleError(message)
    tracer.give(node.outputs[0], ids)


def _vector_operand(node: ir.Node, ids: Ids) -> int | None:
    """Return the operand that is a constant with a number of its own for each channel."""
    for index, value in enumerate(node.inputs):
        tensor = constant_of(value)
        if tensor is None or tensor.dtype not in FLOAT_TYPES:
            continue
        shape = tuple(tensor.shape.numpy())
        shape = (1,) * (ids.ndim - len(shape)) + shape
        wide = [axis for axis, size in enumerate(ids.shape) if size > 1]
        if wide and all(shape[axis] == ids.shape[axis] for axis in wide):
            return index
    return None


def _carrier(tracer: Tracer, node: ir.Node, ids: Ids) -> int:
    """Return which factor of a product can take the scale of the result.

    Raises:
        CannotScaleError: Neither can.
    """
    known = [index for index, value in enumerate(node.inputs) if value in tracer.layouts]
    computed = [index for index, value in enumerate(node.inputs) if constant_of(value) is None]
    if known or len(computed) == 1:
        return next(iter(known or computed))
    for index, value in enumerate(node.inputs):
        if value is not None and _spans(value, ids) and _can_carry(tracer, value):
            return index
    message = "no weight stands before either of its operands that could take the scale"
    raise CannotScaleError(message)


def _spans(value: ir.Value, ids: Ids) -> bool:
    """Whether a value has a position for each channel."""
    shape = extents_of(value)
    if shape is None:
        return False
    lead = ids.ndim - len(shape)
    wide = [axis for axis, size in enumerate(ids.shape) if size > 1]
    return all(axis >= lead and shape[axis - lead] != 1 for axis in wide)


def _can_carry(tracer: Tracer, value: ir.Value) -> bool:
    """Whether a scale could be carried back from a value to weights, as far as one path tells."""
    while True:
        producer = value.producer()
        if producer is None or value.is_graph_output():
            return False
        if any(_key(use.node) not in tracer.relations for use in value.uses()):
            return False
        if tracer.sites.get(producer) or is_op(producer, *_NORMS):
            return True
        if _key(producer) not in tracer.relations:
            return False
        if is_op(producer, "MatMul"):
            following: ir.Value | None = producer.inputs[1]
        elif is_op(producer, "Mul"):
            return any(
                constant_of(operand) is not None or _can_carry(tracer, operand)
                for operand in producer.inputs
                if operand is not None
            )
        else:
            following = next(
                (v for v in producer.inputs if v is not None and constant_of(v) is None), None
            )
        if following is None:
            return False
        value = following


def _key(node: ir.Node) -> OpKey:
    return standard_domain(node.domain), node.op_type


_NORMS: Final = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_UNARY: Final = ("Identity", "Relu", "LeakyRelu", "Abs", "Neg", "Dropout")
_UNCHANGED: Final = ("Shape", "Size", "IsNaN", "Sign")
_JOINED: Final = ("Add", "Sub", "Max", "Min", "Sum", "Mean", "Where")

RELATIONS: dict[OpKey, Relation] = {
    **{("", op): _unary for op in _UNARY},
    **{("", op): _ignored for op in _UNCHANGED},
    **{("", op): _joined for op in _JOINED},
    ("", "Cast"): _cast,
    ("", "PRelu"): _unary,
    ("", "Clip"): _clip,
    ("", "Mul"): _product,
    ("", "Div"): _product,
}
