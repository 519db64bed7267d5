"""A bfloat16 graph with float32 in its place, for runtimes that have no bfloat16."""

from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes

_TYPE_ATTRIBUTES: Final = ("to", "dtype", "output_dtype")


def widened(model: ir.Model) -> ir.Model:
    """Return the model itself where it has no bfloat16, else a copy that computes in float32.

    Its weights are those of the model, widened when they are read: exact, as every bfloat16 is a
    float32. Intermediate values are not rounded to bfloat16 any more.
    """
    if not _has_bfloat16(model):
        return model
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _wide(value.const_value)
            _retype(value)
        for value in graph.inputs:
            _retype(value)
    for node in all_nodes(copy):
        for value in node.outputs:
            _retype(value)
        for attribute in list(node.attributes.values()):
            _widen_attribute(node, attribute)
    return copy


def _has_bfloat16(model: ir.Model) -> bool:
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [output for node in all_nodes(model) for output in node.outputs]
    return any(value.dtype == ir.DataType.BFLOAT16 for value in values)


def _retype(value: ir.Value) -> None:
    if value.dtype == ir.DataType.BFLOAT16:
        # A type of its own: copies share theirs with the model.
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype != ir.DataType.BFLOAT16:
        return tensor

    def values() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype(np.float32))

    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(values, ir.DataType.FLOAT, shape, name=tensor.name)


def _widen_attribute(node: ir.Node, attribute: ir.Attr) -> None:
    if attribute.is_ref():
        return
    name = attribute.name
    if attribute.type == ir.AttributeType.TENSOR:
        node.attributes[name] = ir.AttrTensor(name, _wide(attribute.as_tensor()))
    elif (
        attribute.type == ir.AttributeType.INT
        and name in _TYPE_ATTRIBUTES
        and attribute.as_int() == ir.DataType.BFLOAT16
    ):
        node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
