"""Splits ops on codes, as other tools write them, into standard ops between quantizers."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.ir.dataflow import (
    MICROSOFT,
    all_nodes,
    constant_of,
    is_op,
    node_name,
)
from qcompiler.ir.editing import add_initializer, bypass, fresh_name, value_names
from qcompiler.ir.substitution import new_node, substitute
from qcompiler.ir.weights import WeightStore, read_all
from qcompiler.passes.lower.nbits_weights import nbits_refusal, unpacked_weight
from qcompiler.passes.lower.quantized_op_forms import (
    OperandForm,
    QuantizedForm,
    form_of,
    form_refusal,
)
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "decompose-quantized-ops"


class DecomposeQuantizedOps(Pass):
    """Turn QLinearConv, QLinearMatMul, MatMulNBits and the like into quantizers and float ops.

    Before: y = QLinearConv(x, xs, xz, w, ws, wz, ys, yz, b)
    After:  y = QuantizeLinear(Conv(DequantizeLinear(x, xs, xz), DequantizeLinear(w, ws, wz),
                DequantizeLinear(b, xs * ws)), ys, yz)
    Refuses: scales that are not constant where a bias needs their product; channels last;
        several scales for an activation; a MatMulNBits with reordered channels or float zero
        points.

    An op that only moves codes moves the values instead, between quantizers of its own; constant
    codes are decoded before it. The result
    means the same in real arithmetic: what was summed in integers is summed in floats.
    What types its codes have is not changed, which is `recode-weights`' and
    `center-activations`' part.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite every op on codes that has a form."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        taken = value_names(model) | {node.name for node in all_nodes(model) if node.name}
        for node in list(all_nodes(model)):
            name, op_type = node_name(node), node.op_type
            reason = _rewrite(node, context.store, taken)
            if reason:
                skips.append(Skip(RULE, name, reason))
            elif reason is not None:
                rewrites.append(Rewrite(RULE, name, op_type))
        return PassResult(tuple(rewrites), tuple(skips))


def _rewrite(node: ir.Node, store: WeightStore, taken: set[str]) -> str | None:
    """Rewrite an op on codes; return why not, "" when done, None for other ops."""
    form = form_of(node)
    if form is not None:
        reason = form_refusal(node, form)
        if not reason:
            _decompose(node, form, taken)
        return reason
    if is_op(node, *_CARRIERS):
        return "" if _lift(node, taken) or _decode_before(node, taken) else None
    if node.domain != MICROSOFT:
        return None
    if node.op_type == "MatMulNBits":
        reason = nbits_refusal(node)
        if not reason:
            _unpack(node, store, taken)
        return reason
    if node.op_type in _QUANTIZERS:
        _standardize(node)
        return ""
    return None


_CARRIERS = (
    *("Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Squeeze", "Tile", "Transpose"),
    *("DepthToSpace", "Expand", "SpaceToDepth", "Unsqueeze"),
)
"""What moves or selects codes: on the values that they stand for it does the same."""
_BIAS = 5
"""Position of the bias of a MatMulNBits."""
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
"""In the domain com.microsoft they mean the same and took more types earlier."""


def _lift(node: ir.Node, taken: set[str]) -> bool:
    """Let an op that moves codes move their values, between quantizers; False for other data."""
    codes = node.inputs[0]
    quantize = codes.producer() if codes is not None else None
    if not is_op(quantize, "QuantizeLinear") or quantize is None or len(node.outputs) != 1:
        return False
    graph, output = node.graph, node.outputs[0]
    assert graph is not None
    parts = _Parts(node, taken)
    grid = list(quantize.inputs[1:])
    dtype = _dtype(grid[0])
    data = parts.add("DequantizeLinear", [codes, *grid], "decoded", dtype)
    data.shape = codes.shape if codes is not None else None
    again = parts.add("QuantizeLinear", [output, *grid], "quantized", quantize.outputs[0].dtype)
    again.shape = output.shape
    ir.convenience.replace_all_uses_with(output, again, replace_graph_outputs=True)
    decode, encode = parts.nodes
    encode.replace_input_with(0, output)
    for key in ("output_dtype",):
        if key in quantize.attributes:
            encode.attributes.add(quantize.attributes[key])
    node.replace_input_with(0, data)
    output.type = ir.TensorType(dtype)
    graph.insert_before(node, decode)
    graph.insert_after(node, encode)
    return True


def _decode_before(node: ir.Node, taken: set[str]) -> bool:
    """Decode constant codes before an op that moves them, not after; False for other data.

    One scale for all elements, or the order matters.
    """
    codes, output = node.inputs[0], node.outputs[0]
    readers = [use.node for use in output.uses()]
    if constant_of(codes) is None or not readers or output.is_graph_output():
        return False
    first = readers[0]
    for reader in readers:
        scale = constant_of(reader.inputs[1]) if is_op(reader, "DequantizeLinear") else None
        if scale is None or scale.size != 1 or reader.inputs[1:] != first.inputs[1:]:
            return False
    graph = node.graph
    assert graph is not None
    parts = _Parts(node, taken)
    dtype = _dtype(first.inputs[1])
    data = parts.add("DequantizeLinear", [codes, *first.inputs[1:]], "decoded", dtype)
    data.shape = codes.shape if codes is not None else None
    graph.insert_before(node, parts.nodes)
    node.replace_input_with(0, data)
    output.type = ir.TensorType(dtype)
    for reader in readers:
        reader.replace_input_with(0, output)
        bypass(reader)
    return True


def _standardize(node: ir.Node) -> None:
    attributes = {
        name: attribute.as_int()
        for name, attribute in node.attributes.items()
        if name in ("axis", "block_size")
    }
    made = new_node(
        RULE,
        node.op_type,
        list(node.inputs),
        node_name(node),
        attributes=attributes,
        dtype=node.outputs[0].dtype,
    )
    substitute(node, [made])


class _Parts:
    """The nodes that take the place of one, and their names."""

    def __init__(self, node: ir.Node, taken: set[str]) -> None:
        self.nodes: list[ir.Node] = []
        self._name = node_name(node)
        self._taken = taken

    def fresh(self, part: str) -> str:
        """Return a name that nobody has."""
        return fresh_name(f"{self._name}.{part}", self._taken)

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        part: str,
        dtype: ir.DataType | None,
        **attributes: int,
    ) -> ir.Value:
        """Add a node and return its output."""
        made = new_node(RULE, op_type, inputs, self.fresh(part), attributes=attributes, dtype=dtype)
        self.nodes.append(made)
        return made.outputs[0]


def _decompose(node: ir.Node, form: QuantizedForm, taken: set[str]) -> None:
    parts = _Parts(node, taken)
    forms = form.operands(node)
    operands: list[ir.Value | None] = [
        _dequantized(node, operand, parts, f"operand_{index}")
        for index, operand in enumerate(forms)
    ]
    dtype = _dtype(node.inputs[forms[0].scale])
    has_bias = form.bias is not None and form.bias < len(node.inputs)
    codes = node.inputs[form.bias] if has_bias and form.bias is not None else None
    if codes is not None:
        scale = _bias_scale(node, form, parts.fresh("bias_scale"))
        operands.append(parts.add("DequantizeLinear", [codes, scale], "bias", dtype, axis=0))
    result = parts.add(form.op, operands, "float", dtype)
    result.shape = node.outputs[0].shape
    for key in form.attributes:
        if key in node.attributes:
            parts.nodes[-1].attributes.add(node.attributes[key])
    if form.result is not None and form.result[0] < len(node.inputs):
        inputs = [result, *(node.inputs[place] for place in form.result)]
        parts.add("QuantizeLinear", inputs, "quantized", node.outputs[0].dtype)
    substitute(node, parts.nodes)


def _dtype(scale: ir.Value | None) -> ir.DataType:
    return scale.dtype if scale is not None and scale.dtype is not None else ir.DataType.FLOAT


def _dequantized(node: ir.Node, operand: OperandForm, parts: _Parts, part: str) -> ir.Value:
    inputs = [node.inputs[place] for place in operand.places]
    axis = {} if operand.axis is None else {"axis": operand.axis}
    value = parts.add("DequantizeLinear", inputs, part, _dtype(inputs[1]), **axis)
    source = inputs[0]
    value.shape = source.shape if source is not None else None
    return value


def _bias_scale(node: ir.Node, form: QuantizedForm, name: str) -> ir.Value:
    """Return what one step of a bias is worth: the product of the operands' scales."""
    scales = []
    for operand in form.operands(node):
        tensor = constant_of(node.inputs[operand.scale])
        assert tensor is not None  # or the form would have been refused
        scales.append(read_all(tensor).astype(np.float32))
    factor = node.attributes.get("alpha")
    step = scales[0].reshape(-1)[0] * scales[1] * np.float32(factor.as_float() if factor else 1.0)
    if step.size == 1:
        step = step.reshape(())
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return add_initializer(graph, name, ir.tensor(step.astype(np.float32), name=name))


def _unpack(node: ir.Node, store: WeightStore, taken: set[str]) -> None:
    """Put DequantizeLinear, Transpose and MatMul in the place of a MatMulNBits."""
    parts, graph = _Parts(node, taken), node.graph
    assert isinstance(graph, ir.Graph)
    weight = unpacked_weight(node, store, parts.fresh("codes"))
    dtype = weight.scale.dtype
    operands = [
        add_initializer(graph, tensor.name or "", tensor)
        for tensor in (weight.codes, weight.scale, weight.zero_point)
    ]
    rows, columns = weight.codes.shape.numpy()
    decoded = parts.add(
        "DequantizeLinear", operands, "weight", dtype, axis=1, block_size=weight.block_size
    )
    decoded.shape = ir.Shape((rows, columns))
    turned = parts.add("Transpose", [decoded], "turned", dtype)
    parts.nodes[-1].attributes.add(ir.AttrInt64s("perm", (1, 0)))
    turned.shape = ir.Shape((columns, rows))
    result = parts.add("MatMul", [node.inputs[0], turned], "product", dtype)
    result.shape = node.outputs[0].shape
    bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
    if bias is not None:
        parts.add("Add", [result, bias], "sum", dtype)
    substitute(node, parts.nodes)
