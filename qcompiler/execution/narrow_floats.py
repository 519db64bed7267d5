"""Running graphs of 16-bit floats: in float32, with every value rounded as it is stored.

ONNX Runtime's CPU provider runs what it has no 16-bit kernel for in float32, and hands the
float32 result on where the next op has none either. So a float16 graph whose `Mul(x, x)` overflows
may well run there without an infinity, and one of bfloat16 does not run at all. Here each value is
rounded by a Cast to the type and one back, which the runtime leaves alone.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from qcompiler.ir.dataflow import all_graphs, all_nodes
from qcompiler.ir.editing import fresh_name, value_names

_NARROW: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TYPE_ATTRIBUTES: Final = ("to", "dtype", "output_dtype")


def emulated(model: ir.Model) -> ir.Model:
    """Return a copy that computes in float32 and rounds what was stored in 16 bits.

    Values keep their names; what an op adds up inside itself is not rounded.
    """
    copy = model.clone()
    taken = value_names(copy)
    for graph in all_graphs(copy):
        for value in (*graph.inputs, *graph.initializers.values()):
            if value.const_value is not None and value.const_value.dtype in _NARROW:
                value.const_value = _wide(value.const_value)
            if value.dtype in _NARROW:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(all_nodes(copy)):
        for attribute in list(node.attributes.values()):
            _widen_attribute(node, attribute)
        for value in node.outputs:
            if value.dtype in _NARROW:
                _round(node, value, taken)
    return copy


def has_bfloat16(model: ir.Model) -> bool:
    """Whether a model computes in bfloat16, for which ONNX Runtime has no kernels on a CPU."""
    return ir.DataType.BFLOAT16 in _types_in(model)


def has_narrow_floats(model: ir.Model) -> bool:
    """Whether a model computes in a type that `emulated` rounds to."""
    return not _types_in(model).isdisjoint(_NARROW)


def _types_in(model: ir.Model) -> set[ir.DataType | None]:
    values = [*model.graph.inputs]
    for graph in all_graphs(model):
        values += graph.initializers.values()
    values += [value for node in all_nodes(model) for value in node.outputs]
    return {value.dtype for value in values}


def runnable(model: ir.Model) -> ir.Model:
    """Return a model that ONNX Runtime runs on a CPU: `emulated` where it holds bfloat16."""
    return emulated(model) if has_bfloat16(model) else model


def _round(node: ir.Node, value: ir.Value, taken: set[str]) -> None:
    graph, narrow, name = node.graph, value.dtype, value.name or ""
    assert graph is not None
    assert narrow is not None
    value.name = fresh_name(f"{name}:unrounded", taken)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    down = ir.node("Cast", [value], {"to": int(narrow)}, name=fresh_name(f"{name}:down", taken))
    up = ir.node("Cast", [down.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{name}:up")
    down.outputs[0].name = down.name
    rounded = up.outputs[0]
    rounded.type, rounded.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    value.replace_all_uses_with(rounded, replace_graph_outputs=True)
    down.replace_input_with(0, value)
    rounded.name = name
    graph.insert_after(node, [down, up])


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype not in _NARROW:
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
        and attribute.as_int() in _NARROW
    ):
        node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
