"""Trying several sets of ranges on a model, in one session."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds
from qcompiler.calibration.grid_error import grid_of
from qcompiler.calibration.quality import Reference
from qcompiler.ir.dataflow import is_op
from qcompiler.ir.provenance import QUANTIZER, RANGE, quantizer_of
from qcompiler.ir.substitution import new_node
from qcompiler.quant.qtype import qtype_named
from qcompiler.rewriting.base import Pass, PassContext

Ranges = Mapping[str, tuple[float, float]]
"""Lower and upper end by name of the value."""


def try_ranges(
    model: ir.Model,
    candidates: Sequence[Ranges],
    passes: Sequence[Pass],
    reference: Reference,
    context: PassContext,
) -> list[float]:
    """Return how near each set of ranges leaves the outputs to float, weights in float.

    The quantized graph is the same for all of them, but for its scales and zero points: these
    become inputs, so that one session serves all.

    Args:
        model: A model whose values are marked, outlier channels included; not changed.
        candidates: Sets of ranges of the same values.
        passes: What quantizes the activations of a model with ranges.
        reference: What to compare with.
        context: What the passes need.
    """
    copy = model.clone()
    names: dict[ir.Value, str] = {}
    for value in (*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs)):
        name = value.name or ""
        if name in candidates[0]:
            names[value] = name
            value.metadata_props[RANGE] = json.dumps(candidates[0][name])
    for rewrite in passes:
        rewrite.run(copy, context)
    operands = _open_operands(copy.graph, names, set(candidates[0]))
    return reference.nearness_each(copy, [_feeds(operands, ranges) for ranges in candidates])


_Operands = tuple[ir.Value, ir.Value | None, str]
"""Scale and zero point, which are graph inputs, and the text form of a quantizer."""


def _open_operands(
    graph: ir.Graph, names: Mapping[ir.Value, str], wanted: set[str]
) -> dict[str, _Operands]:
    """Make scales and zero points graph inputs; return them with the type, by quantized value.

    Zero points of floats are 0 whatever the range, and stay.
    """
    found: dict[str, _Operands] = {}
    for node in list(graph):
        if not is_op(node, "QuantizeLinear") or node.inputs[0] is None:
            continue
        value = node.inputs[0]
        # A pass may have put another value under the name, or another name on the value.
        name = names.get(value, value.name or "")
        scale, zero_point = node.inputs[1], node.inputs[2]
        if name not in wanted or scale is None or zero_point is None:
            continue
        fixed = quantizer_of(value)[0].floating
        moving = None if fixed else _opened(graph, zero_point)
        found[name] = (_opened(graph, scale), moving, value.metadata_props[QUANTIZER])
    return found


def _feeds(operands: Mapping[str, _Operands], ranges: Ranges) -> Feeds:
    feeds: Feeds = {}
    for name, (scale, zero_point, quantizer) in operands.items():
        type_name, _, symmetry = quantizer.partition(":")
        assert scale.dtype is not None
        kind = scale.dtype.numpy()
        grid = grid_of(
            *ranges[name], qtype_named(type_name), symmetric=symmetry == "sym", scale_dtype=kind
        )
        feeds[scale.name or ""] = np.array(grid.scale, kind)
        if zero_point is None:
            continue
        assert zero_point.dtype is not None
        feeds[zero_point.name or ""] = np.array(grid.zero_point, zero_point.dtype.numpy())
    return feeds


def _opened(graph: ir.Graph, operand: ir.Value) -> ir.Value:
    """Make an initializer an input; one below 8 bits is fed as bytes, since NumPy has no other."""
    name = operand.name or ""
    graph.initializers.pop(name, None)
    operand.const_value = None
    fed = operand
    if operand.dtype is not None and operand.dtype.bitwidth < 8:
        plain = ir.DataType.INT8 if operand.dtype.is_signed() else ir.DataType.UINT8
        operand.name = f"{name}.replaced"
        fed = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(plain))
        to = {"to": operand.dtype.value}
        cast = new_node("try-ranges", "Cast", [fed], f"{name}.narrow", attributes=to)
        cast.outputs[0].dtype = operand.dtype
        graph.insert_before(graph[0], cast)
        operand.replace_all_uses_with(cast.outputs[0])
    graph.inputs.append(fed)
    return fed
