"""Which quantized matrix products ONNX Runtime turns into integer kernels by itself.

Measured with ONNX Runtime 1.32; the lowering passes rewrite what it leaves alone.
"""

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.byte_codes import CodedMatrix, coded_matrix, tensor_of
from qcompiler.ir.dataflow import constant_of, int_attribute, ints_attribute, is_op, only_reader
from qcompiler.ir.provenance import scheme_of
from qcompiler.quant.scheme import Activations

_TWO_BIT_OUTPUTS = 4


@dataclass(frozen=True, slots=True)
class WeightPath:
    """How a coded matrix reaches the right side of a MatMul or Gemm.

    Attributes:
        matrix: The codes and their DequantizeLinear.
        transpose: The Transpose between them and the op, None where there is none.
        transposed: Whether the op multiplies by the transposed matrix, so that codes are `[N, K]`.
    """

    matrix: CodedMatrix
    transpose: ir.Node | None
    transposed: bool

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        rows, columns = self.matrix.shape
        return rows if self.transposed else columns

    @property
    def reduction(self) -> int:
        """Number of input channels."""
        rows, columns = self.matrix.shape
        return columns if self.transposed else rows

    @property
    def along_reduction(self) -> bool:
        """Whether blocks, or the one scale per channel, lie along the input channels."""
        return self.matrix.axis == (1 if self.transposed else 0)

    @property
    def exclusive(self) -> bool:
        """Whether nothing else reads codes, scale, zero point or the dequantized weight."""
        if self.matrix.in_bytes:
            return False
        made = [self.matrix.dequantize.outputs[0]]
        if self.transpose is not None:
            made.append(self.transpose.outputs[0])
        values = [*self.matrix.operands, *made]
        return all(len(value.uses()) == 1 and not value.is_graph_output() for value in values)


def weight_path(node: ir.Node) -> WeightPath | None:
    """Follow the right input of a MatMul or Gemm to a coded matrix; None if there is none."""
    if not is_op(node, "MatMul", "Gemm") or node.inputs[1] is None:
        return None
    producer = node.inputs[1].producer()
    transpose = None
    if producer is not None and is_op(producer, "Transpose") and producer.inputs[0] is not None:
        if ints_attribute(producer, "perm") not in (None, (1, 0)):
            return None
        transpose, producer = producer, producer.inputs[0].producer()
    matrix = coded_matrix(producer)
    if matrix is None:
        return None
    turned = is_op(node, "Gemm") and int_attribute(node, "transB", 0) == 1
    return WeightPath(matrix, transpose, turned != (transpose is not None))


def reads_codes(node: ir.Node) -> bool:
    """Whether an op is to be fused with the DequantizeLinear of its data into an integer kernel.

    Not so where its scheme leaves activations in float: its codes are not made for such kernels,
    which saturate with them on CPUs without VNNI, and a ConvTranspose has none.
    """
    scheme = scheme_of(node)
    static = scheme is None or scheme.activations is Activations.STATIC
    return static and reads_dequantized(node)


def reads_dequantized(node: ir.Node) -> bool:
    """Whether the data input of an op is dequantized right before it.

    A DequantizeLinear of constants does not count; it gives a weight.
    """
    data = node.inputs[0] if node.inputs else None
    producer = data.producer() if data is not None else None
    return (
        producer is not None
        and is_op(producer, "DequantizeLinear")
        and constant_of(producer.inputs[0]) is None
    )


def is_plain_product(node: ir.Node) -> bool:
    """Whether a node is a MatMul, or a Gemm that ONNX Runtime fuses like one.

    Such a Gemm has alpha = beta = 1, transposes nothing, and its bias, if any, has one element
    per output channel: MatMulNBits does not broadcast it, and a fused `[1]` does not load.
    """
    if not is_op(node, "Gemm"):
        return is_op(node, "MatMul")
    scales = [node.attributes.get(name) for name in ("alpha", "beta")]
    if any(scale is not None and scale.as_float() != 1.0 for scale in scales):
        return False
    if int_attribute(node, "transA", 0) or int_attribute(node, "transB", 0):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    path = weight_path(node)
    return bias is None or (path is not None and bias.shape == (path.outputs,))


def is_half_in_body(node: ir.Node, path: WeightPath, main: ir.Graph) -> bool:
    """Whether a product lies in an If, Loop or Scan body and has float16 scales.

    Where ONNX Runtime computes it in float32, it casts the scales and does not fold that Cast in
    a body. MatMulNBits with accuracy_level 4, which its own fusion makes, returns zeros for
    scales that are not constant; with level 1 it is right.
    """
    return node.graph is not main and tensor_of(path.matrix.scale).dtype == ir.DataType.FLOAT16


def is_fused_by_runtime(node: ir.Node, path: WeightPath, main: ir.Graph) -> bool:
    """Whether ONNX Runtime makes a MatMulNBits of a product and its DequantizeLinear.

    It does not when the data is dequantized too, but makes an integer product of codes that may
    saturate. Nor does it when codes or scales are shared, for blocks behind a Transpose, before a
    Relu or Clip, and inside a body whose weights lie outside of it. It fuses into wrong results at
    2 bits where the number of output channels is no multiple of 4, and in float16 inside a body;
    that counts as "not".

    Args:
        node: The product.
        path: How its weight reaches it.
        main: The main graph of the model.
    """
    if is_half_in_body(node, path, main) or reads_dequantized(node):
        return False
    if not is_plain_product(node) or not path.exclusive or not path.along_reduction:
        return False
    if _feeds_clipping(node):
        return False
    if any(value.graph is not node.graph for value in path.matrix.operands):
        return False
    if path.transposed:
        return path.matrix.block_size is None and path.matrix.bits == 8
    return path.matrix.bits != 2 or path.outputs % _TWO_BIT_OUTPUTS == 0


def _feeds_clipping(node: ir.Node) -> bool:
    """Whether a Relu or Clip behind a product keeps ONNX Runtime from looking at its weight.

    Measured with 1.32: it does when it alone reads the result and is no graph output itself,
    also behind the Add that makes a Gemm of a MatMul on matrices; no other activation does.
    """
    result = node.outputs[0]
    reader = only_reader(result)
    data = node.inputs[0]
    on_matrices = data is None or data.shape is None or len(data.shape) == 2
    if is_op(node, "MatMul") and on_matrices and is_op(reader, "Add") and reader is not None:
        reader = only_reader(reader.outputs[0])
    if reader is None or not is_op(reader, "Relu", "Clip"):
        return False
    return not reader.outputs[0].is_graph_output()
