"""Graphs of narrow floats with float32 in their place."""

from collections.abc import Collection
from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.ir.dataflow import all_graphs, all_nodes

_TYPE_ATTRIBUTES: Final = ("to", "dtype", "output_dtype")
_BFLOAT16: Final = (ir.DataType.BFLOAT16,)


def widened(model: ir.Model) -> ir.Model:
    """Return the model itself where it has no bfloat16, else a copy that computes in float32.

    For runtimes that have no bfloat16. Its weights are those of the model, widened when they are
    read: exact, as every bfloat16 is a float32. Intermediate values are not rounded to bfloat16
    any more.
    """
    if ir.DataType.BFLOAT16 not in float_types_in(model):
        return model
    copy = widened_copy(model, _BFLOAT16)
    for node in all_nodes(copy):
        for value in node.outputs:
            _retype(value, _BFLOAT16)
    return copy


def float_types_in(model: ir.Model) -> set[ir.DataType | None]:
    """Return the types of inputs, weights and computed values of a model, bodies too."""
    values = [*model.graph.inputs]
    for graph in all_graphs(model):
        values += graph.initializers.values()
    values += [value for node in all_nodes(model) for value in node.outputs]
    return {value.dtype for value in values}


def widened_copy(model: ir.Model, narrow: Collection[ir.DataType]) -> ir.Model:
    """Return a copy with float32 for some types in inputs, weights and attributes.

    Computed values keep the types they had: what becomes of them is left to the caller.

    Args:
        model: The model.
        narrow: Types that float32 holds exactly.
    """
    copy = model.clone()
    for graph in all_graphs(copy):
        for value in (*graph.inputs, *graph.initializers.values()):
            if value.const_value is not None:
                value.const_value = _wide(value.const_value, narrow)
            _retype(value, narrow)
    for node in all_nodes(copy):
        for attribute in list(node.attributes.values()):
            _widen_attribute(node, attribute, narrow)
    return copy


def _retype(value: ir.Value, narrow: Collection[ir.DataType]) -> None:
    if value.dtype in narrow:
        # A type of its own: copies share theirs with the model.
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _wide(tensor: ir.TensorProtocol, narrow: Collection[ir.DataType]) -> ir.TensorProtocol:
    if tensor.dtype not in narrow:
        return tensor

    def values() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype(np.float32))

    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(values, ir.DataType.FLOAT, shape, name=tensor.name)


def _widen_attribute(node: ir.Node, attribute: ir.Attr, narrow: Collection[ir.DataType]) -> None:
    if attribute.is_ref():
        return
    name = attribute.name
    if attribute.type == ir.AttributeType.TENSOR:
        node.attributes[name] = ir.AttrTensor(name, _wide(attribute.as_tensor(), narrow))
    elif (
        attribute.type == ir.AttributeType.INT
        and name in _TYPE_ATTRIBUTES
        and attribute.as_int() in narrow
    ):
        node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
