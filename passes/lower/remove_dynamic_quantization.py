"""Computes with the data of products that other tools round at each run, on the same weights."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes, constant_of, is_op, node_name, only_reader
from qcompiler.ir.editing import (
    add_initializer,
    drop_unused_initializers,
    fresh_name,
    is_used,
    remove_node,
    value_names,
)
from qcompiler.ir.substitution import new_node, substitute
from qcompiler.ir.weights import read_all
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "remove-dynamic-quantization"
_STANDARD = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
_CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@dataclass(frozen=True, slots=True)
class _Product:
    """A product of codes, and what makes floats of it.

    Attributes:
        node: MatMulInteger or ConvInteger.
        quantize: The DynamicQuantizeLinear of its data.
        cast: The Cast of its result.
        scaled: The Mul of that by both scales.
        scales: The Mul of the scales.
        weight_scale: The constant one of them.
    """

    node: ir.Node
    quantize: ir.Node
    cast: ir.Node
    scaled: ir.Node
    scales: ir.Node
    weight_scale: ir.Value


class RemoveDynamicQuantization(Pass):
    """Multiply floats by decoded weights where a product rounds its data at each run.

    Before: q, s, z = DynamicQuantizeLinear(x); y = Cast(MatMulInteger(q, w, z, wz)) * (s * ws)
    After:  y = MatMul(x, DequantizeLinear(w, ws, wz))
    Refuses: products whose result is used in another way than this; weights or scales that are
        not constant; several scales of a convolution.

    The weights stay what they are; the data is no longer rounded, so that the result is nearer to
    the model that was quantized. It is for targets that have no scales of the run.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite every MatMulInteger and ConvInteger of this form."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        taken = value_names(model) | {node.name for node in all_nodes(model) if node.name}
        for node in list(all_nodes(model)):
            if not is_op(node, *_STANDARD):
                continue
            name, op_type = node_name(node), node.op_type
            found = _product_of(node)
            reason = found if isinstance(found, str) else _refusal(found)
            if isinstance(found, str) or reason:
                skips.append(Skip(RULE, name, reason))
                continue
            _replace(found, taken)
            rewrites.append(Rewrite(RULE, name, op_type))
        return PassResult(tuple(rewrites), tuple(skips))


def _product_of(node: ir.Node) -> _Product | str:
    """Return the product, or why it has another form."""
    data = node.inputs[0]
    quantize = data.producer() if data is not None else None
    if quantize is None or not is_op(quantize, "DynamicQuantizeLinear"):
        return "its data is not rounded by a DynamicQuantizeLinear"
    if len(node.inputs) < 3 or node.inputs[2] is not quantize.outputs[2]:
        return "the zero point of its data is another one"
    cast = only_reader(node.outputs[0])
    scaled = only_reader(cast.outputs[0]) if cast is not None and is_op(cast, "Cast") else None
    if cast is None or scaled is None or not is_op(scaled, "Mul"):
        return "its sums are not cast and scaled right away"
    other = scaled.inputs[1] if scaled.inputs[0] is cast.outputs[0] else scaled.inputs[0]
    scales = other.producer() if other is not None else None
    if scales is None or not is_op(scales, "Mul"):
        return "its scale is not the product of two"
    parts = [value for value in scales.inputs if value is not quantize.outputs[1]]
    if len(parts) != 1 or parts[0] is None:
        return "its scale is not that of its data times that of its weight"
    return _Product(node, quantize, cast, scaled, scales, parts[0])


def _refusal(found: _Product) -> str:
    """Return why a product stays, "" if it can be rewritten."""
    codes, scale = constant_of(found.node.inputs[1]), constant_of(found.weight_scale)
    if codes is None or scale is None:
        return "its weight or the scale of it is computed at run time"
    point = _zero_point(found)
    if point is not None and constant_of(point) is None:
        return "the zero point of its weight is computed at run time"
    sizes = {scale.size, 1 if point is None else constant_of(point).size}  # type: ignore[union-attr]
    if found.node.op_type == "ConvInteger" and sizes != {1}:
        return "the weight of a convolution has several scales"
    columns = codes.shape.numpy()[-1]
    if not sizes <= {1, columns}:
        return "its weight has scales that are not those of its columns"
    return ""


def _zero_point(found: _Product) -> ir.Value | None:
    return found.node.inputs[3] if len(found.node.inputs) > 3 else None


def _replace(found: _Product, taken: set[str]) -> None:
    node, name = found.node, node_name(found.node)
    dtype = found.scaled.outputs[0].dtype or ir.DataType.FLOAT
    decoded = new_node(
        RULE,
        "DequantizeLinear",
        [node.inputs[1], *_operands(found, taken)],
        fresh_name(f"{name}.weight", taken),
        attributes={} if node.op_type == "ConvInteger" else {"axis": -1},
        dtype=dtype,
    )
    codes = node.inputs[1]
    decoded.outputs[0].shape = codes.shape if codes is not None else None
    product = new_node(
        RULE,
        _STANDARD[node.op_type],
        [found.quantize.inputs[0], decoded.outputs[0]],
        fresh_name(f"{name}.product", taken),
        dtype=dtype,
    )
    for key in _CONV_ATTRIBUTES:
        if key in node.attributes:
            product.attributes.add(node.attributes[key])
    point = _zero_point(found)
    substitute(found.scaled, [decoded, product])
    for dead in (found.cast, node, found.scales, found.quantize):
        if dead.graph is not None and not any(is_used(output) for output in dead.outputs):
            remove_node(dead)
    drop_unused_initializers([found.weight_scale, point])


def _operands(found: _Product, taken: set[str]) -> list[ir.Value]:
    """Return scale and zero point of the weight, in one shape."""
    scale, point = _values(found.weight_scale), _zero_point(found)
    points = None if point is None else _values(point)
    size = max(scale.size, 1 if points is None else points.size)
    shape = () if size == 1 else (size,)
    graph = found.node.graph
    assert isinstance(graph, ir.Graph)
    made = []
    for part, values in (("scale", scale), ("zero_point", points)):
        if values is not None:
            name = fresh_name(f"{node_name(found.node)}.weight_{part}", taken)
            spread = np.ascontiguousarray(np.broadcast_to(values.reshape(-1), (size,)))
            made.append(add_initializer(graph, name, ir.tensor(spread.reshape(shape), name=name)))
    return made


def _values(value: ir.Value) -> npt.NDArray[Any]:
    tensor = constant_of(value)
    assert tensor is not None  # or the product would have been refused
    return read_all(tensor)
