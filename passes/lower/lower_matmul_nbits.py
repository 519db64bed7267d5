"""Writes MatMulNBits where ONNX Runtime would not make it from Q/DQ."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.execution.ort_fusion import (
    WeightPath,
    is_fused_by_runtime,
    is_half_in_body,
    is_plain_product,
    reads_codes,
    weight_path,
)
from qcompiler.ir.byte_codes import (
    SMALLEST_BLOCK,
    ByteMatrix,
    shared_bytes,
    tensor_of,
    transposed_block,
    transposed_bytes,
)
from qcompiler.ir.dataflow import MICROSOFT, all_nodes, is_op, node_name
from qcompiler.ir.editing import add_initializer, constant_value, drop_unused_initializers
from qcompiler.ir.provenance import scheme_of
from qcompiler.ir.substitution import needs_microsoft_ops, new_node, substitute
from qcompiler.ir.weights import WeightStore, read_all
from qcompiler.passes.lower.stored_bytes import record_stored_bytes
from qcompiler.quant.scheme import Activations
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "lower-matmul-nbits"
LARGEST_SPREAD_BLOCK = 256
"""Block size up to which one scale per channel is repeated; larger ones were not measured."""


_LEVEL_IN_HALF_BODIES = 1
"""Accuracy level that is right with scales that ONNX Runtime casts at each run."""


@dataclass(frozen=True, slots=True)
class MatMulNBitsOptions:
    """Options of `lower-matmul-nbits`.

    Attributes:
        accuracy_level: What the kernel computes in: 4 rounds activations to 8 bits per block, as
            ONNX Runtime's own fusion does and fastest; 1 keeps them in float32.
    """

    accuracy_level: int = 4


class LowerMatMulNBits(Pass):
    """Turn quantized products that ONNX Runtime does not fuse into MatMulNBits.

    It leaves alone: codes or scales that several ops share (a tied embedding), blocks that reach
    the product through a Transpose, products in a body whose weights lie outside of it; and it
    computes wrong results from 2-bit weights with output channels not a multiple of 4.

    Before: y = MatMul(x, Transpose(DequantizeLinear(codes [N, K], scale [N, K/B])))
    After:  y = MatMulNBits(x, bytes uint8 [N, K/B, B * bits/8], scale, zero points)
    Refuses: blocks along the output channels; blocks that are no power of two from 16; codes
        `[N, K]` whose K the blocks do not divide; bfloat16; products with dynamic activations.

    Codes stored `[N, K]` are shared with a lookup of the same table; codes stored `[K, N]` are
    rewritten transposed.
    """

    name: ClassVar[str] = "lower-matmul-nbits"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    options: MatMulNBitsOptions

    def __init__(self, options: MatMulNBitsOptions | None = None) -> None:
        self.options = options or MatMulNBitsOptions()

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite every MatMul over a coded matrix that the runtime would not fuse."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for node in _unfused(model):
            path = weight_path(node)
            assert path is not None
            reason = _refusal(node, path)
            if reason:
                skips.append(Skip(RULE, node_name(node), reason))
                continue
            rewrites.append(Rewrite(RULE, node_name(node), f"{path.matrix.bits}-bit weights"))
            level = self.options.accuracy_level
            if is_half_in_body(node, path, model.graph):
                level = min(level, _LEVEL_IN_HALF_BODIES)
            self._lower(node, path, context.store, level)
            needs_microsoft_ops(model)
        record_stored_bytes(model, self.name)
        return PassResult(tuple(rewrites), tuple(skips))

    def _lower(self, node: ir.Node, path: WeightPath, store: WeightStore, level: int) -> None:
        block = _block_size(path)
        name = node_name(node)
        if path.transposed:
            data = shared_bytes(path.matrix, store)
        else:
            data = transposed_bytes(path.matrix, block, store)
        blocks = -(-path.reduction // block)
        width = block * path.matrix.bits // 8
        made = [
            self._constant_node(node, "Reshape", data.codes, (path.outputs, blocks, width), name)
        ]
        data = _with_own_scale(node, data)
        scale, zero_point = self._spread(node, data, path, blocks, made)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        inputs = [node.inputs[0], made[0].outputs[0], scale]
        if zero_point is not None or bias is not None:
            inputs += [zero_point]
        if bias is not None:
            inputs += [None, bias]
        attributes = {
            "K": path.reduction,
            "N": path.outputs,
            "accuracy_level": level,
            "bits": path.matrix.bits,
            "block_size": block,
        }
        product = new_node(
            self.name, "MatMulNBits", inputs, name, domain=MICROSOFT, attributes=attributes
        )
        substitute(node, [*made, product])

    def _spread(
        self, node: ir.Node, data: ByteMatrix, path: WeightPath, blocks: int, made: list[ir.Node]
    ) -> tuple[ir.Value, ir.Value | None]:
        """Repeat one scale per channel for every block, at session start."""
        if path.matrix.block_size is not None or not path.transposed or blocks == 1:
            return data.scale, data.zero_point
        name = node_name(node)
        shape = (path.outputs, blocks)
        made.append(self._constant_node(node, "Expand", data.scale, shape, f"{name}.scale"))
        scale = made[-1].outputs[0]
        if data.zero_point is None:
            return scale, None
        made.append(
            self._constant_node(node, "Expand", data.zero_point, shape, f"{name}.zero_point")
        )
        return scale, made[-1].outputs[0]

    def _constant_node(
        self, node: ir.Node, op_type: str, value: ir.Value, shape: tuple[int, ...], name: str
    ) -> ir.Node:
        """Return a Reshape or Expand of a constant, which the runtime folds when it loads."""
        label = f"{name}.{op_type.lower()}"
        target = constant_value(f"{label}.shape", ir.tensor(np.array(shape, np.int64)))
        target.const_value.name = target.name  # type: ignore[union-attr]
        assert isinstance(node.graph, ir.Graph)
        node.graph.register_initializer(target)
        return new_node(self.name, op_type, [value, target], label, dtype=value.dtype)


def _with_own_scale(node: ir.Node, data: ByteMatrix) -> ByteMatrix:
    """Return float16 data with a copy of the scale that this product alone reads.

    Where ONNX Runtime computes a float16 product in float32, it casts the scale, and folds the
    Cast only if nothing else reads the scale; for a scale that is not constant, the kernel with
    accuracy level 4 returns zeros (measured with 1.32).
    """
    tensor = tensor_of(data.scale)
    if tensor.dtype != ir.DataType.FLOAT16:
        return data
    name = f"{node_name(node)}.own_scale"
    assert isinstance(node.graph, ir.Graph)
    copy = ir.tensor(read_all(tensor), dtype=tensor.dtype, name=name)
    own = add_initializer(node.graph, name, copy)
    drop_unused_initializers([data.scale])
    return replace(data, scale=own)


def _unfused(model: ir.Model) -> list[ir.Node]:
    """Return the products over coded matrices that the runtime leaves alone, in graph order.

    Decided before anything changes: with one of two readers rewritten, the other would look as
    if it had its weight to itself.
    """
    found = []
    for node in all_nodes(model):
        path = weight_path(node) if is_op(node, "MatMul", "Gemm") else None
        if (
            path is not None
            and not reads_codes(node)
            and not is_fused_by_runtime(node, path, model.graph)
        ):
            found.append(node)
    return found


def _block_size(path: WeightPath) -> int:
    """Return the block size the kernel is told, 0 where there is none."""
    matrix = path.matrix
    if matrix.block_size is not None:
        return matrix.block_size
    if not path.transposed:
        return transposed_block(matrix, LARGEST_SPREAD_BLOCK)
    divisor = path.reduction & -path.reduction
    return min(LARGEST_SPREAD_BLOCK, divisor) if divisor >= SMALLEST_BLOCK else 0


def _refusal(node: ir.Node, path: WeightPath) -> str:
    """Return why a product stays as it is, "" if it can be rewritten."""
    matrix = path.matrix
    scheme = scheme_of(node)
    if scheme is not None and scheme.activations is Activations.DYNAMIC:
        return "its activations are quantized at run time, which lower-dynamic-quantization does"
    if not is_plain_product(node):
        return "it is a Gemm that does more than a product and a bias; decompose-gemm splits it"
    if matrix.dequantize.outputs[0].dtype == ir.DataType.BFLOAT16:
        return "ONNX Runtime's CPU kernel takes float32 or float16, not bfloat16"
    if not path.along_reduction:
        return "its scales lie along the output channels, and MatMulNBits has one per input block"
    return _block_refusal(path)


def _block_refusal(path: WeightPath) -> str:
    matrix, block = path.matrix, _block_size(path)
    if block == 0:
        return f"no block size from {SMALLEST_BLOCK} divides its {path.reduction} input channels"
    if block < SMALLEST_BLOCK or block & (block - 1):
        return f"MatMulNBits has no blocks of {block}; they are powers of two from {SMALLEST_BLOCK}"
    if path.transposed and path.reduction % block:
        return f"blocks of {block} do not divide its {path.reduction} input channels"
    spread = matrix.block_size is None and path.reduction != block
    if path.transposed and spread and matrix.bits < 8 and (matrix.zero_point or not matrix.signed):
        return "packed zero points per channel cannot be repeated for every block"
    return ""
