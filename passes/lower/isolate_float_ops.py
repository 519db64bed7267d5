"""Keeps ONNX Runtime from quantizing what was left in float between quantized values."""

from typing import ClassVar, Final

import onnx_ir as ir

from qcompiler.execution.ort_fusion import reads_dequantized
from qcompiler.ir.dataflow import all_nodes, is_op, node_name
from qcompiler.ir.editing import fresh_name, value_names
from qcompiler.ir.provenance import PLACEMENT, SCHEME
from qcompiler.ir.substitution import new_node
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage

RULE = "isolate-float-ops"
_WITH_WEIGHTS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_WITHOUT: Final = ("AveragePool", "Softmax")
"""Of both, ONNX Runtime 1.32 makes integer kernels between dequantized and quantized values."""
_PASSED: Final = ("Relu", "Clip", "Add")
"""What it fuses or removes on the way to the QuantizeLinear."""


class IsolateFloatOps(Pass):
    """Put a copy between a DequantizeLinear and a float op that is followed by a QuantizeLinear.

    ONNX Runtime rounds float weights there to 8 bits per tensor, whatever was planned; it does so
    with an op that was excluded for its sensitivity, and its codes saturate without VNNI. Softmax,
    and an AveragePool that its integer kernel computes wrongly, are not safe from it either. A
    Concat of one input costs a copy; the optimizer neither removes it nor looks through it.

    Before: z = QuantizeLinear(Conv(DequantizeLinear(x), w), ...)     # w: float
    After:  z = QuantizeLinear(Conv(Concat(DequantizeLinear(x)), w), ...)
    Refuses: nothing; ops that are to run on integers are left alone.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Isolate every op that was given no place among the quantized ones."""
        rewrites: list[Rewrite] = []
        taken = value_names(model) | {node.name for node in all_nodes(model) if node.name}
        for node in list(all_nodes(model)):
            planned = is_op(node, *_WITH_WEIGHTS) and SCHEME in node.metadata_props
            if not (planned or is_op(node, *_WITHOUT)) or PLACEMENT in node.metadata_props:
                continue
            if not reads_dequantized(node) or not _is_quantized_after(node):
                continue
            data, graph = node.inputs[0], node.graph
            assert data is not None
            assert graph is not None
            name = fresh_name(f"{data.name}.copy", taken)
            copy = new_node(RULE, "Concat", [data], name, attributes={"axis": 0}, dtype=data.dtype)
            copy.outputs[0].shape = data.shape
            graph.insert_before(node, copy)
            node.replace_input_with(0, copy.outputs[0])
            rewrites.append(Rewrite(RULE, node_name(node), "stays in float"))
        return PassResult(tuple(rewrites))


def _is_quantized_after(node: ir.Node) -> bool:
    pending = [use.node for use in node.outputs[0].uses()]
    while pending:
        reader = pending.pop()
        if is_op(reader, "QuantizeLinear"):
            return True
        if is_op(reader, *_PASSED):
            pending += [use.node for use in reader.outputs[0].uses()]
    return False
