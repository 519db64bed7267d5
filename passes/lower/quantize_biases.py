"""Rounds biases to the 32-bit codes that integer kernels add to their sums."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.execution.ort_fusion import reads_codes, weight_path
from qcompiler.ir.biases import LARGEST_CODE, Bias, bias_of, data_scale
from qcompiler.ir.dataflow import all_nodes, constant_of, int_attribute, is_op, node_name
from qcompiler.ir.editing import add_initializer, drop_unused_initializers, fresh_name, value_names
from qcompiler.ir.substitution import new_node
from qcompiler.ir.weights import read_all
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "quantize-biases"


class QuantizeBiases(Pass):
    """Give an op on quantized data and weights a bias of int32 codes.

    ONNX Runtime rounds a float bias itself only where the output is quantized too. Elsewhere a
    Gemm with a bias, and the one it makes of MatMul and Add, is computed in float.

    Before: y = Gemm(DequantizeLinear(x, s), DequantizeLinear(w, t), c, beta=2)
    After:  y = Gemm(DequantizeLinear(x, s), DequantizeLinear(w, t), DequantizeLinear(c', s * t))
    Refuses: biases whose codes would not leave room for the sums in 32 bits.

    A bias that is no constant, and that of a Gemm with an alpha, is left alone.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite every bias that has a scale."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        taken = value_names(model) | {node.name for node in all_nodes(model) if node.name}
        for node in list(all_nodes(model)):
            bias = bias_of(node) if reads_codes(node) else None
            step = None if bias is None else _step(node, len(bias.values))
            if bias is None or step is None or len(bias.values) not in (1, len(step)):
                continue
            codes = np.rint(bias.values.astype(np.float64) / step)
            if np.abs(codes).max(initial=0) > LARGEST_CODE:
                reason = "its bias has codes that leave no room for the sums in 32 bits"
                skips.append(Skip(RULE, node_name(node), reason))
                continue
            self._replace(bias, codes.astype(np.int32), step, taken)
            node.attributes.pop("beta", None)
            rewrites.append(Rewrite(RULE, node_name(node), "int32"))
        return PassResult(tuple(rewrites), tuple(skips))

    def _replace(
        self,
        bias: Bias,
        codes: npt.NDArray[np.int32],
        step: npt.NDArray[np.float32],
        taken: set[str],
    ) -> None:
        reader, old = bias.node, bias.node.inputs[bias.index]
        graph = reader.graph
        assert old is not None
        assert isinstance(graph, ir.Graph)
        operands = []
        for part, values in (("codes", codes), ("scale", step)):
            name = fresh_name(f"{old.name}.{part}", taken)
            operands.append(add_initializer(graph, name, ir.tensor(values, name=name)))
        name = fresh_name(f"{old.name}.dequantized", taken)
        node = new_node(
            RULE, "DequantizeLinear", operands, name, attributes={"axis": 0}, dtype=old.dtype
        )
        node.outputs[0].shape = ir.Shape(step.shape)
        graph.insert_before(reader, node)
        reader.replace_input_with(bias.index, node.outputs[0])
        drop_unused_initializers([old])


def _step(node: ir.Node, count: int) -> npt.NDArray[np.float32] | None:
    """Return what one step of the sums is worth, `[channels]`; None where it is not known.

    Args:
        node: The op.
        count: Elements of its bias, which stand for the channels where the weight has one scale.
    """
    data, weight = data_scale(node), _weight_scale(node)
    alpha = node.attributes.get("alpha")
    if data is None or weight is None or (alpha is not None and alpha.as_float() != 1.0):
        return None
    step = read_all(weight).astype(np.float32) * np.float32(data)
    if step.ndim == 0:
        step = np.full(count, step, np.float32)
    return step if step.ndim == 1 and (step > 0).all() else None


def _weight_scale(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the scales of a weight with one for each output channel, or one for all of them."""
    producer = _dequantize_of(node)
    scale = constant_of(producer.inputs[1]) if producer is not None else None
    if scale is not None and len(scale.shape) == 0:
        return scale
    if is_op(node, "Conv"):
        plain = producer is not None and int_attribute(producer, "axis", 1) == 0
        return scale if plain else None
    path = weight_path(node)
    if path is None or path.matrix.block_size is not None or not path.along_reduction:
        return None
    return constant_of(path.matrix.scale)


def _dequantize_of(node: ir.Node) -> ir.Node | None:
    """Return the DequantizeLinear of a weight, behind a Transpose too."""
    source = node.inputs[1]
    producer = source.producer() if source is not None else None
    if producer is not None and is_op(producer, "Transpose") and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer if is_op(producer, "DequantizeLinear") else None
