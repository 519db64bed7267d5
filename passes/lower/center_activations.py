"""Gives activations that other tools quantized signed codes without zero points."""

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes, constant_of, int_attribute, is_op, node_name
from qcompiler.ir.editing import (
    add_initializer,
    drop_unused_initializers,
    fresh_name,
    value_names,
)
from qcompiler.ir.substitution import new_node
from qcompiler.ir.weights import read_all
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "center-activations"
_RANGES: Final = {"INT8": (-128, 127), "UINT8": (0, 255)}
_LOWEST, _HIGHEST = -128, 127


@dataclass(frozen=True, slots=True)
class _Grid:
    """The codes of an activation.

    Attributes:
        scale: One step.
        low: Smallest code less the zero point.
        high: Largest code less the zero point.
    """

    scale: np.float32
    low: int
    high: int

    @property
    def fits(self) -> bool:
        """Whether int8 without a zero point has exactly these steps."""
        return (self.low, self.high) == (_LOWEST, _HIGHEST)

    @property
    def widened(self) -> np.float32:
        """The smallest scale with which int8 covers the same range."""
        return np.float32(self.scale * max(self.high / _HIGHEST, self.low / _LOWEST))


class CenterActivations(Pass):
    """Turn unsigned and asymmetric codes of activations into int8 whose zero point is 0.

    Before: y = DequantizeLinear(QuantizeLinear(x, s, 128), s, 128)      # uint8
    After:  y = DequantizeLinear(QuantizeLinear(x, s, 0), s, 0)          # int8, the same values
    Refuses: codes of 16 bits; scales per channel or computed at run time; codes that something
        else than a DequantizeLinear reads, or that are an input or output of the model.

    With other zero points int8 does not have the same steps: the scale grows until it covers the
    range, at most twofold, which costs up to one bit, and a Clip keeps what saturated saturating:
    a zero point at the lowest code makes a Relu of the rounding.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite every QuantizeLinear with its DequantizeLinears."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        taken = value_names(model) | {node.name for node in all_nodes(model) if node.name}
        for node in list(all_nodes(model)):
            if not is_op(node, "QuantizeLinear") or _is_centred(node):
                continue
            reason = _refusal(node)
            if reason:
                skips.append(Skip(RULE, node_name(node), reason))
                continue
            name, growth = node_name(node), _center(node, taken)
            rewrites.append(Rewrite(RULE, name, f"steps {growth:.2f} times as large"))
            if growth > 1:
                reason = "int8 without a zero point does not have the same steps: they are now "
                skips.append(Skip(RULE, name, f"{reason}{growth:.2f} times as large"))
        return PassResult(tuple(rewrites), tuple(skips))


def _code_type(node: ir.Node) -> str:
    """Return the type of the codes of a QuantizeLinear."""
    stated = int_attribute(node, "output_dtype", 0)
    if stated:
        return ir.DataType(stated).name
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if point is None:
        return "UINT8"
    return point.dtype.name if point.dtype is not None else ""


def _is_centred(node: ir.Node) -> bool:
    point = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = constant_of(point)
    zero = point is None or (tensor is not None and not np.any(read_all(tensor).astype(np.float32)))
    return zero and not _code_type(node).startswith("UINT")


def _refusal(node: ir.Node) -> str:
    """Return why the codes of a QuantizeLinear stay, "" if they can be centred."""
    code_type = _code_type(node)
    if code_type not in _RANGES:
        return f"int8 does not hold codes of {code_type}"
    constants = [constant_of(value) for value in node.inputs[1:] if value is not None]
    if any(tensor is None for tensor in constants):
        return "its scale or zero point is computed at run time"
    if any(tensor is not None and tensor.size != 1 for tensor in constants):
        return "it has several scales"
    codes = node.outputs[0]
    if codes.is_graph_output():
        return "its codes are an output of the model"
    for use in codes.uses():
        if not is_op(use.node, "DequantizeLinear") or use.idx != 0:
            return f"its codes are also read by {node_name(use.node)} ({use.node.op_type})"
        if not _same_grid(node, use.node):
            return f"{node_name(use.node)} decodes its codes on another grid"
    return ""


def _same_grid(quantize: ir.Node, dequantize: ir.Node) -> bool:
    """Whether both have the same scale and zero point, by value."""
    return (
        all(_number(quantize, index) == _number(dequantize, index) for index in (1, 2))
        and _number(quantize, 1) is not None
    )


def _number(node: ir.Node, index: int) -> float | None:
    """Return a scale or zero point; an absent zero point is 0."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return 0.0
    tensor = constant_of(value)
    return None if tensor is None else float(read_all(tensor).astype(np.float32).reshape(()))


def _center(node: ir.Node, taken: set[str]) -> float:
    """Rewrite one QuantizeLinear and its readers; return by how much its steps grew."""
    low, high = _RANGES[_code_type(node)]
    zero = int(_number(node, 2) or 0)
    scale = np.float32(_number(node, 1) or 0)
    grid = _Grid(scale, low - zero, high - zero)
    readers = [use.node for use in node.outputs[0].uses()]
    old = list(node.inputs[1:])
    if not grid.fits:
        _clip(node, grid, taken)
    operands = _operands(node, grid, taken)
    codes = node.outputs[0]
    codes.type = ir.TensorType(ir.DataType.INT8)
    for one in (node, *readers):
        old += one.inputs[1:]
        one.resize_inputs(3)
        for index, operand in enumerate(operands, start=1):
            one.replace_input_with(index, operand)
        one.attributes.pop("output_dtype", None)
    drop_unused_initializers(old)
    return 1.0 if grid.fits else float(grid.widened / grid.scale)


def _operands(node: ir.Node, grid: _Grid, taken: set[str]) -> tuple[ir.Value, ir.Value]:
    """Return scale and zero point of the new codes."""
    graph, scale = node.graph, node.inputs[1]
    assert isinstance(graph, ir.Graph)
    assert scale is not None
    stem = node.outputs[0].name or node_name(node)
    if not grid.fits:
        dtype = scale.dtype or ir.DataType.FLOAT
        name = fresh_name(f"{stem}.scale", taken)
        tensor = ir.tensor(np.array(grid.widened, dtype.numpy()), dtype=dtype, name=name)
        scale = add_initializer(graph, name, tensor)
    name = fresh_name(f"{stem}.zero_point", taken)
    shape = constant_of(scale).shape.numpy()  # type: ignore[union-attr]
    point = ir.tensor(np.zeros(shape, np.int8), name=name)
    return scale, add_initializer(graph, name, point)


def _clip(node: ir.Node, grid: _Grid, taken: set[str]) -> None:
    """Put a Clip to the old range in front of a QuantizeLinear."""
    data, graph = node.inputs[0], node.graph
    assert data is not None
    assert isinstance(graph, ir.Graph)
    dtype = data.dtype or ir.DataType.FLOAT
    bounds = []
    for part, code in (("low", grid.low), ("high", grid.high)):
        name = fresh_name(f"{data.name}.{part}", taken)
        values = np.array(np.float32(code) * grid.scale, dtype.numpy())
        bounds.append(add_initializer(graph, name, ir.tensor(values, dtype=dtype, name=name)))
    name = fresh_name(f"{data.name}.clipped", taken)
    clip = new_node(RULE, "Clip", [data, *bounds], name, dtype=data.dtype)
    clip.outputs[0].shape = data.shape
    graph.insert_before(node, clip)
    node.replace_input_with(0, clip.outputs[0])
