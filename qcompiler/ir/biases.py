"""Constants that are added to what an op multiplies, and how large their codes get.

Integer kernels add a bias to their 32-bit sums, in steps of data scale times weight scale.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import constant_of, is_op
from qcompiler.ir.quantizable import row_of
from qcompiler.ir.weights import read_all

LARGEST_CODE: Final = 1 << 30
"""Of a bias: half of what 32 bits hold. The other half is left to the products, which take
64 * 255 for each input channel at most where neighbouring codes are limited to 128."""


@dataclass(frozen=True, slots=True)
class Bias:
    """A constant that is added to each output channel.

    Attributes:
        node: The node that reads it.
        index: Position among its inputs.
        values: float32 `[1]` or `[channels]`, times the beta of a Gemm.
    """

    node: ir.Node
    index: int
    values: npt.NDArray[np.float32]


def bias_of(node: ir.Node) -> Bias | None:
    """Return what is added to the products of a Conv, Gemm or MatMul; None where nothing is.

    A MatMul has a bias where an Add of a constant alone reads its result, and that is a matrix or
    has a fixed shape: ONNX Runtime makes a Gemm of both before it looks at quantization.
    """
    row = row_of(node)
    if row is None or row.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    place = (node, row.bias) if row.bias is not None else _added_to(node)
    if place is None:
        return None
    reader, index = place
    tensor = constant_of(reader.inputs[index]) if index < len(reader.inputs) else None
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    if any(size != 1 for size in tensor.shape.numpy()[:-1]):
        return None
    beta = node.attributes.get("beta")
    factor = np.float32(1.0 if beta is None else beta.as_float())
    return Bias(reader, index, read_all(tensor).reshape(-1) * factor)


def _added_to(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Return the Add that a MatMul becomes a Gemm with, and the position of the other operand."""
    result = node.outputs[0]
    uses = list(result.uses())
    shape = result.shape
    matrix = shape is not None and (len(shape) == 2 or all(isinstance(d, int) for d in shape))
    if not matrix or len(uses) != 1 or result.is_graph_output() or not is_op(uses[0].node, "Add"):
        return None
    return uses[0].node, 1 - uses[0].idx


def data_scale(node: ir.Node) -> float | None:
    """Return the scale of the codes that an op's data is dequantized from; None if it is not."""
    data = node.inputs[0] if node.inputs else None
    producer = data.producer() if data is not None else None
    if producer is None or not is_op(producer, "DequantizeLinear"):
        return None
    scale = constant_of(producer.inputs[1])
    return float(read_all(scale)) if scale is not None and scale.size == 1 else None
