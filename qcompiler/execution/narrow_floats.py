"""Running graphs of 16-bit floats: in float32, with every value rounded as it is stored.

ONNX Runtime's CPU provider runs what it has no 16-bit kernel for in float32, and hands the
float32 result on where the next op has none either. So a float16 graph whose `Mul(x, x)` overflows
may well run there without an infinity, and one of bfloat16 does not run at all. Here each value is
rounded by a Cast to the type and one back, which the runtime leaves alone.
"""

from typing import Final

import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.editing import fresh_name, value_names
from qcompiler.ir.widened import float_types_in, widened_copy

_NARROW: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def emulated(model: ir.Model) -> ir.Model:
    """Return a copy that computes in float32 and rounds what was stored in 16 bits.

    Values keep their names; what an op adds up inside itself is not rounded.
    """
    copy = widened_copy(model, _NARROW)
    taken = value_names(copy)
    for node in list(all_nodes(copy)):
        for value in node.outputs:
            if value.dtype in _NARROW:
                _round(node, value, taken)
    return copy


def has_bfloat16(model: ir.Model) -> bool:
    """Whether a model computes in bfloat16, for which ONNX Runtime has no kernels on a CPU."""
    return ir.DataType.BFLOAT16 in float_types_in(model)


def has_narrow_floats(model: ir.Model) -> bool:
    """Whether a model computes in a type that `emulated` rounds to."""
    return not float_types_in(model).isdisjoint(_NARROW)


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
