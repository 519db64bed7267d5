"""Folds normalization by constant statistics into the weights beside it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes, constant_of, int_attribute, is_op, node_name
from qcompiler.ir.editing import bypass, drop_unused_initializers, record_origin, value_names
from qcompiler.ir.linear_ops import (
    LINEAR_OPS,
    LinearOp,
    NotFoldableError,
    cast_finite,
    per_channel,
)
from qcompiler.ir.provenance import annotate
from qcompiler.ir.weights import read_all
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

Array = npt.NDArray[Any]

_DEFAULT_EPSILON = 1e-5  # ONNX BatchNormalization-7 and later


@dataclass(frozen=True, slots=True)
class _Affine:
    """`y[c] = scale[c] * x[c] + shift[c]` along the channel axis; float64 `[channels]`."""

    scale: Array
    shift: Array


class FoldBatchNorm(Pass):
    """Fold BatchNormalization, and constant Mul/Add behind convolutions, into weights and biases.

    Before: y = BatchNormalization(Conv(x, w), scale, bias, mean, var)
    After:  y = Conv(x, w', b'), where w' = w * scale / sqrt(var + epsilon) per output channel.
        Norms in front of Conv, Gemm and MatMul likewise, also through MaxPool and Flatten.
        The factors of a norm between two such ops, behind a Relu, go into the first where they
        are positive, and only its shift into the second: multiplied into input channels they
        would spread what shares a quantization scale over orders of magnitude.
    Refuses: training mode; statistics that are computed; a value in between that is read
        elsewhere or is a graph output; weights that others share; a norm in front of a padded
        Conv, whose border would see the shift; one whose channels are not those of the weight; a
        negative factor in front of a MaxPool; results beyond the range of the weight's type.
    """

    name: ClassVar = "fold-batch-norm"
    consumes: ClassVar = Stage.IMPORTED
    produces: ClassVar = Stage.IMPORTED
    numerics: ClassVar = Numerics.REORDERED
    # Weights are rounded once more, and products summed in another order. Random float32 nets
    # differ by 1e-6 and less; models of float16 weights by the ulp of those, which tests hold.
    tolerance: ClassVar = 1e-4

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fold until nothing is left to fold."""
        rewrites: list[Rewrite] = []
        while True:
            found, skips = self._sweep(model, context)
            rewrites.extend(found)
            if not found:
                return PassResult(tuple(rewrites), tuple(skips))

    def _sweep(self, model: ir.Model, context: PassContext) -> tuple[list[Rewrite], list[Skip]]:
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for node in list(all_nodes(model)):
            if not (is_op(node, "BatchNormalization") or _follows_convolution(node)):
                continue
            label = node_name(node)
            try:
                target = _fold(node, model, context)
            except NotFoldableError as refusal:
                skips.append(Skip(self.name, label, str(refusal)))
            else:
                rewrites.append(Rewrite(self.name, label, f"{node.op_type} into {target}"))
        return rewrites, skips


def _follows_convolution(node: ir.Node) -> bool:
    """Whether a node applies a constant to what a convolution gives."""
    if not is_op(node, "Mul", "Add", "Sub", "Div"):
        return False
    data, constant = _operands(node)
    if data is None or constant_of(constant) is None:
        return False
    return is_op(data.producer(), "Conv", "ConvTranspose")


def _operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Return data and constant of a Mul, Add, Sub or Div; data and scale of a norm."""
    first, second = node.inputs[:2]
    swapped = is_op(node, "Mul", "Add") and constant_of(first) is not None
    return (second, first) if swapped else (first, second)


def _fold(node: ir.Node, model: ir.Model, context: PassContext) -> str:
    """Fold one node into the op before or behind it, and return that op's name."""
    data = _operands(node)[0]
    assert data is not None
    producer = _linear_producer(data)
    if producer is not None:
        op = LinearOp.of(producer)
        _check_between(op, data, node)
        affine = _affine_of(node, op)
        weight = op.scaled_weight(op.output_factors(affine.scale))
        bias = op.read_bias() * affine.scale + affine.shift
    else:
        reader, way = _linear_reader(node)
        op = LinearOp.of(reader)
        affine = _carried(_norm_of(node), way, op, data)
        bias = op.read_bias() + _shift_through(op, affine.shift)
        writer = _writer_before(data, node, _norm_of(node).scale)
        if writer is None:
            weight = op.scaled_weight(op.input_factors(affine.scale))
        else:
            weight = op.scaled_weight(op.input_factors(np.ones_like(affine.scale)))
            scale = _norm_of(node).scale
            scaled = writer.scaled_weight(writer.output_factors(scale))
            _write(writer, scaled, writer.read_bias() * scale, node, model, context)
    _write(op, weight, bias, node, model, context)
    operands = [value for value in node.inputs if value is not data]
    if node.inputs[0] is not data and node.inputs[1] is data:
        node.replace_input_with(0, data)
    refusal = bypass(node)
    assert refusal is None, refusal
    drop_unused_initializers(operands)
    return node_name(op.node)


def _write(
    op: LinearOp, weight: Array, bias: Array, norm: ir.Node, model: ir.Model, context: PassContext
) -> None:
    """Give an op its new weight and bias, and note that it stands for the norm as well."""
    name = f"{node_name(op.node)}_bias"
    bias = cast_finite(bias, weight.dtype)
    added = op.write(weight, bias, context.store, name, value_names(model))
    if added is not None:
        annotate(added, created_by=FoldBatchNorm.name)
    record_origin(op.node, node_name(norm))


def _writer_before(data: ir.Value, norm: ir.Node, scale: Array) -> LinearOp | None:
    """Return the linear op whose output channels can take a norm's factors, None without one.

    Between them may be nodes that a positive factor changes places with, read by nobody else.
    """
    if not np.all(scale > 0):
        return None
    value = data
    while True:
        producer = value.producer()
        alone = len(value.uses()) == 1 and not value.is_graph_output()
        if producer is None or not alone or producer.graph is not norm.graph:
            return None
        if not is_op(producer, "Relu", "LeakyRelu", "MaxPool") or len(producer.outputs) != 1:
            break
        source = producer.inputs[0]
        assert source is not None
        value = source
    linear = _linear_producer(value)
    if linear is None:
        return None
    try:
        op = LinearOp.of(linear)
        _check_between(op, value, norm)
    except NotFoldableError:
        return None
    return op if op.channels_out == scale.size else None


def _linear_producer(data: ir.Value) -> ir.Node | None:
    """Return the linear op that computes a value, a MatMul also through the Add of its bias."""
    producer = data.producer()
    if producer is not None and is_op(producer, "Add"):
        for value in producer.inputs:
            before = None if value is None else value.producer()
            if before is not None and is_op(before, "MatMul"):
                return before
    return producer if is_op(producer, *LINEAR_OPS) else None


def _check_between(op: LinearOp, data: ir.Value, node: ir.Node) -> None:
    """Refuse where someone else sees what lies between the op and the norm."""
    if op.output is not data:
        message = f"{op.output.name} is also read elsewhere, or more than a bias is added to it"
    elif data.is_graph_output():
        message = f"its input {data.name} is a graph output too"
    elif len(data.uses()) != 1:
        message = f"its input {data.name} is also read elsewhere"
    elif op.node.graph is not node.graph:
        message = "the op before it stands in another graph body"
    elif is_op(op.node, "MatMul") and _rank(data) != 2:
        message = "its channels are not known to be the columns of the MatMul's weight"
    else:
        return
    raise NotFoldableError(message)


def _linear_reader(node: ir.Node) -> tuple[ir.Node, list[ir.Node]]:
    """Return the only reader of a norm, a linear op, and the pools and Flattens on the way."""
    output, way = node.outputs[0], list[ir.Node]()
    while True:
        users = output.consumers()
        if output.is_graph_output():
            message = "no weight stands before it, and its result is a graph output"
        elif len(output.uses()) != 1:
            message = "no weight stands before it, and its result is read more than once"
        elif users[0].graph is not node.graph:
            message = "the op behind it stands in another graph body"
        elif is_op(users[0], "MaxPool", "Flatten") and len(users[0].outputs) == 1:
            way.append(users[0])
            output = users[0].outputs[0]
            continue
        elif not is_op(users[0], *LINEAR_OPS) or users[0].inputs[0] is not output:
            message = f"no weight stands before it, and {node_name(users[0])} behind it has none"
        else:
            return users[0], way
        raise NotFoldableError(message)


def _carried(affine: _Affine, way: list[ir.Node], op: LinearOp, data: ir.Value) -> _Affine:
    """Carry a norm behind the nodes that lie between it and a linear op.

    A maximum and a positive factor can change places, in floats too, as rounding is monotonic.
    Flatten puts the positions of a channel side by side.
    """
    flat = any(is_op(node, "Flatten") for node in way)
    if is_op(op.node, "Conv", "ConvTranspose"):
        fits = not flat
    elif flat:
        fits = all(int_attribute(node, "axis", 1) == 1 for node in way if is_op(node, "Flatten"))
    else:
        fits = _rank(data) == 2
    if not fits or int_attribute(op.node, "transA", 0):
        message = f"its channels are not those that the {op.node.op_type} behind it sums over"
        raise NotFoldableError(message)
    if any(is_op(node, "MaxPool") for node in way) and not np.all(affine.scale > 0):
        message = "a factor that is not positive does not change places with the maximum behind it"
        raise NotFoldableError(message)
    positions = op.channels_in // max(1, affine.scale.size) if flat else 1
    wide = _Affine(np.repeat(affine.scale, positions), np.repeat(affine.shift, positions))
    return _checked(wide, op.channels_in)


def _shift_through(op: LinearOp, shift: Array) -> Array:
    """Return what a shift of the input channels adds to the output channels."""
    if not np.any(shift):
        return np.zeros(op.channels_out)
    if is_op(op.node, "ConvTranspose"):
        message = "it shifts the input of a ConvTranspose, which the border sees only in part"
        raise NotFoldableError(message)
    if op.padded:
        message = "it shifts the input of a padded Conv, and the padding is not shifted"
        raise NotFoldableError(message)
    return op.shift_of_inputs(shift)


def _affine_of(node: ir.Node, op: LinearOp) -> _Affine:
    """Read what a node does to each output channel of the op before it."""
    if is_op(node, "BatchNormalization"):
        return _checked(_norm_of(node), op.channels_out)
    return _checked(_operand_of(node, op.channels_out, len(op.tensor.shape) - 2), op.channels_out)


def _checked(affine: _Affine, channels: int) -> _Affine:
    if affine.scale.shape != (channels,):
        message = f"it has {affine.scale.size} channels and the weight {channels}"
        raise NotFoldableError(message)
    if not (np.all(np.isfinite(affine.scale)) and np.all(np.isfinite(affine.shift))):
        message = "its factors are not finite"
        raise NotFoldableError(message)
    return affine


def _norm_of(node: ir.Node) -> _Affine:
    if int_attribute(node, "training_mode", 0) or any(value.name for value in node.outputs[1:]):
        message = "it is in training mode, where statistics come from the data"
        raise NotFoldableError(message)
    if not int_attribute(node, "spatial", 1):
        message = "it has statistics per position, not per channel"
        raise NotFoldableError(message)
    tensors = [constant_of(value) for value in node.inputs[1:5]]
    values = [read_all(t).astype(np.float64).reshape(-1) for t in tensors if t is not None]
    if len(values) != 4:
        message = "its statistics are computed at run time"
        raise NotFoldableError(message)
    gamma, beta, mean, variance = values
    attribute = node.attributes.get("epsilon")
    spread = variance + (_DEFAULT_EPSILON if attribute is None else attribute.as_float())
    if np.any(spread <= 0):
        message = "its variance plus epsilon is not positive"
        raise NotFoldableError(message)
    scale = gamma / np.sqrt(spread)
    return _Affine(scale, beta - mean * scale)


def _operand_of(node: ir.Node, channels: int, spatial: int) -> _Affine:
    tensor = constant_of(_operands(node)[1])
    vector = None if tensor is None else per_channel(tensor, channels, after=spatial)
    if vector is None:
        message = "its constant is not one number per channel"
        raise NotFoldableError(message)
    if is_op(node, "Mul"):
        return _Affine(vector, np.zeros(channels))
    if is_op(node, "Div"):
        with np.errstate(divide="ignore"):
            return _Affine(1.0 / vector, np.zeros(channels))
    return _Affine(np.ones(channels), -vector if is_op(node, "Sub") else vector)


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)
