"""Gives convolutions of codes by codes scales in float32, which their kernels want."""

from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from qcompiler.ir.dataflow import all_graphs, all_nodes, constant_of, is_op, node_name
from qcompiler.ir.editing import (
    add_initializer,
    drop_unused_initializers,
    fresh_name,
    value_names,
)
from qcompiler.ir.substitution import new_node
from qcompiler.ir.weights import read_all
from qcompiler.passes.lower.stored_bytes import record_stored_bytes
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage

RULE: Final = "widen-scales"
_NARROW: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class WidenScales(Pass):
    """Dequantize in float32, and cast, where a convolution multiplies codes in 16 bits.

    TensorRT-RTX converts 16-bit scales of such convolutions to float32 itself where weights have
    one for each channel, and warns of it; the engine multiplies the same codes either way. The
    numbers are the same, too: a scale is exact in float32, and what it gives is rounded once.

    Before: y = Conv(DequantizeLinear(q, s), DequantizeLinear(c, t))      # s, t: float16
    After:  y = Conv(Cast<float16>(DequantizeLinear(q, s')), Cast<float16>(DequantizeLinear(c, t')))
    Refuses: nothing; float32 scales, scales for a whole weight, and convolutions whose data is
        float draw no warning, and stay, as does what is an output of the model.

    The QuantizeLinear keeps its 16-bit scale of the same value.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Widen what every such convolution reads, once where several read it."""
        rewrites: list[Rewrite] = []
        taken = value_names(model) | {node.name for node in all_nodes(model) if node.name}
        homes = {
            value: graph for graph in all_graphs(model) for value in graph.initializers.values()
        }
        for node in list(all_nodes(model)):
            narrow = [each for each in _decoders(node) if each.outputs[0].dtype in _NARROW]
            for each in narrow:
                _widen(each, homes, taken)
            if narrow:
                rewrites.append(Rewrite(RULE, node_name(node), f"{len(narrow)} scales in float32"))
        if rewrites:
            record_stored_bytes(model, None)
        return PassResult(tuple(rewrites))


def _decoders(node: ir.Node) -> tuple[ir.Node, ...]:
    """Return what makes data and weight of a convolution, () where there is nothing to widen."""
    data, weight = _decoder(node, 0), _decoder(node, 1)
    if not is_op(node, "Conv") or data is None or weight is None or not _per_channel(weight):
        return ()
    return data, weight


def _decoder(node: ir.Node, index: int) -> ir.Node | None:
    """Return the DequantizeLinear with a constant scale that makes an input of a node."""
    value = node.inputs[index] if index < len(node.inputs) else None
    producer = None if value is None else value.producer()
    if value is None or producer is None or not is_op(producer, "DequantizeLinear"):
        return None
    if value.is_graph_output():
        return None  # its type and name must stay
    return None if constant_of(producer.inputs[1]) is None else producer


def _per_channel(decoder: ir.Node) -> bool:
    scale = constant_of(decoder.inputs[1])
    return scale is not None and scale.size > 1


def _widen(decoder: ir.Node, homes: dict[ir.Value, ir.Graph], taken: set[str]) -> None:
    """Give a DequantizeLinear a float32 scale, and its readers what they read before."""
    scale, result, graph = decoder.inputs[1], decoder.outputs[0], decoder.graph
    assert scale is not None
    assert graph is not None
    assert result.dtype is not None
    narrow = result.dtype
    tensor = constant_of(scale)
    assert tensor is not None
    wide = read_all(tensor).astype(np.float32)
    name = fresh_name(f"{scale.name}.float32", taken)
    twin = add_initializer(homes.get(scale, graph), name, ir.tensor(wide, name=name))
    decoder.replace_input_with(1, twin)
    drop_unused_initializers([scale])
    name = fresh_name(f"{result.name}.{narrow.name.lower()}", taken)
    cast = new_node(RULE, "Cast", [result], name, attributes={"to": int(narrow)}, dtype=narrow)
    cast.outputs[0].shape = result.shape
    result.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, result)
    result.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(decoder, cast)
