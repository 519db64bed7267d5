"""Integer codes as the rows of bytes that com.microsoft kernels read.

GatherBlockQuantized and MatMulNBits take codes of 8, 4 or 2 bits as uint8, unsigned, packed along
the reduction axis, low bits first; without a zero point they assume the middle of the range. ONNX
packs a whole tensor the same way, so a `[N, K]` tensor of unsigned codes whose rows end on a byte
is already in that form: only its type and shape change, and no byte is read. Signed codes differ
by one flipped bit each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import constant_of, int_attribute, is_op
from qcompiler.ir.editing import add_initializer
from qcompiler.ir.weights import WeightStore, read_all, read_slice, reinterpret
from qcompiler.quant.packing import pack

Bytes = npt.NDArray[np.uint8]

_SLICE_BYTES: Final = 4 << 20
_SIGN_BITS: Final = {8: 0x80, 4: 0x88, 2: 0xAA}
"""Per bits of a code: the mask that flips the sign bit of every code in a byte."""
SMALLEST_BLOCK: Final = 16
"""Both kernels ask for block sizes that are powers of two from 16."""


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """A two-dimensional weight behind a DequantizeLinear with constant inputs.

    Attributes:
        dequantize: The DequantizeLinear.
        codes: Its codes, of shape `[rows, columns]`.
        scale: Its scales.
        zero_point: Its zero points, None where it has none.
        axis: The axis of the blocks; for one scale per channel, the axis that is summed over.
        block_size: Elements per block, None for one scale per channel.
    """

    dequantize: ir.Node
    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    axis: int
    block_size: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = tensor_of(self.codes).shape.numpy()
        return rows, columns

    @property
    def reduction(self) -> int:
        """Number of elements that are summed over."""
        return self.shape[self.axis]

    @property
    def bits(self) -> int:
        """Bits a code is stored in."""
        return tensor_of(self.codes).dtype.bitwidth

    @property
    def signed(self) -> bool:
        """Whether codes are two's complement."""
        return tensor_of(self.codes).dtype.name.startswith("INT")

    @property
    def operands(self) -> tuple[ir.Value, ...]:
        """Codes, scale and, if present, zero point."""
        present = (self.codes, self.scale, self.zero_point)
        return tuple(value for value in present if value is not None)

    @property
    def in_bytes(self) -> bool:
        """Whether `shared_bytes` was called for these codes, so that bytes are there to share."""
        graph = self.codes.graph
        return graph is not None and _bytes_name(self.codes) in graph.initializers

    @property
    def row_block(self) -> int:
        """Block size a kernel is told when one block covers a row."""
        return max(SMALLEST_BLOCK, 1 << (self.reduction - 1).bit_length())


@dataclass(frozen=True, slots=True)
class ByteMatrix:
    """Codes, scales and zero points in the kernels' form; blocks lie along the rows.

    Attributes:
        codes: uint8 `[N, K * bits / 8]`.
        scale: Float `[N, blocks]`.
        zero_point: uint8 `[N, ceil(blocks * bits / 8)]`, None for mid-range.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """Return the tensor of a constant value.

    Raises:
        ValueError: The value is not constant.
    """
    tensor = constant_of(value)
    if tensor is None:
        message = f"{value.name} is not constant"
        raise ValueError(message)
    return tensor


def coded_matrix(node: ir.Node | None) -> CodedMatrix | None:
    """Read a DequantizeLinear of a constant matrix; None for anything else.

    One scale for the whole tensor, and types other than 8-, 4- and 2-bit integers, are not read.
    """
    if node is None or not is_op(node, "DequantizeLinear"):
        return None
    codes, scale = node.inputs[0], node.inputs[1]
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    tensors = [constant_of(value) for value in (codes, scale, zero_point) if value is not None]
    if codes is None or scale is None or any(tensor is None for tensor in tensors):
        return None
    tensor, scales = constant_of(codes), constant_of(scale)
    assert tensor is not None
    assert scales is not None
    if len(tensor.shape) != 2 or tensor.dtype.bitwidth not in _SIGN_BITS:
        return None
    if len(scales.shape) == 0 or not tensor.dtype.is_integer():
        return None
    axis = int_attribute(node, "axis", 1) % 2
    block_size = int_attribute(node, "block_size", 0)
    if block_size:
        return CodedMatrix(node, codes, scale, zero_point, axis, block_size)
    return CodedMatrix(node, codes, scale, zero_point, 1 - axis, None)


def shared_bytes(matrix: CodedMatrix, store: WeightStore) -> ByteMatrix:
    """Return a matrix with blocks along axis 1 in the kernels' form, as initializers.

    The initializers are made once: a second call for the same codes finds them. Unsigned codes
    keep their bytes where they are; signed ones are rewritten in slices of 4 MiB.

    Raises:
        ValueError: Blocks lie along axis 0, or a row does not end on a byte.
    """
    rows, columns = matrix.shape
    if matrix.axis != 1 or columns * matrix.bits % 8:
        message = f"the rows of {matrix.codes.name} are not whole bytes of blocks"
        raise ValueError(message)
    graph = matrix.codes.graph
    assert isinstance(graph, ir.Graph)
    blocks = -(-columns // matrix.block_size) if matrix.block_size else 1
    codes = _initializer(graph, _bytes_name(matrix.codes), lambda name: _bytes(matrix, name, store))
    scale = matrix.scale
    scales = tensor_of(scale)
    if len(scales.shape) != 2:
        scale = _initializer(
            graph,
            f"{matrix.scale.name}.rows",
            lambda name: reinterpret(scales, scales.dtype, (rows, 1), name),
        )
    points_name = f"{matrix.codes.name}.zero_point_bytes"
    zero_point = None
    if matrix.zero_point is not None or not matrix.signed:
        zero_point = _initializer(graph, points_name, lambda name: _points(matrix, blocks, name))
    return ByteMatrix(codes, scale, zero_point)


def transposed_bytes(matrix: CodedMatrix, block_size: int, store: WeightStore) -> ByteMatrix:
    """Return a `[K, N]` matrix as the kernels' `[N, K]` form, K padded to whole blocks.

    The codes are rewritten; at one byte per code they are held in memory twice. Initializers are
    made once, as in `shared_bytes`.

    Args:
        matrix: A matrix with blocks along axis 0, or one scale per column.
        block_size: Elements per block of the result, which divides the matrix's own.
        store: Where the rewritten codes go.
    """
    graph = matrix.codes.graph
    assert isinstance(graph, ir.Graph)
    blocks = -(-matrix.reduction // block_size)
    repeat = blocks if matrix.block_size is None else 1
    name = f"{matrix.codes.name}.transposed_b{block_size}"

    def codes(name: str) -> ir.TensorProtocol:
        values = _unsigned(matrix.codes, matrix.signed).T
        padding = blocks * block_size - matrix.reduction
        padded = np.pad(values, ((0, 0), (0, padding)))
        return store.put(name, _pack_rows(padded, matrix.bits), ir.DataType.UINT8)

    def scales(name: str) -> ir.TensorProtocol:
        tensor = tensor_of(matrix.scale)
        return store.put(name, _columns(read_all(tensor), repeat), tensor.dtype)

    def points(name: str) -> ir.TensorProtocol:
        if matrix.zero_point is None:
            values = np.zeros((matrix.shape[1], blocks), np.uint8)
        else:
            values = _columns(_unsigned(matrix.zero_point, matrix.signed), repeat)
        return store.put(name, _pack_rows(values, matrix.bits), ir.DataType.UINT8)

    needs_points = matrix.zero_point is not None or not matrix.signed
    return ByteMatrix(
        _initializer(graph, name, codes),
        _initializer(graph, f"{name}.scale", scales),
        _initializer(graph, f"{name}.zero_point", points) if needs_points else None,
    )


def transposed_block(matrix: CodedMatrix, largest: int) -> int:
    """Return the block size from which `transposed_bytes` makes the least bytes.

    Small blocks repeat the one scale per column often, large ones pad the rows; of equals the
    larger is taken, which has fewer scales to read.

    Args:
        matrix: A matrix with one scale per column.
        largest: Largest block size allowed.
    """
    sizes = []
    block = SMALLEST_BLOCK
    while block <= min(largest, matrix.row_block):
        sizes.append(block)
        block *= 2
    return min(reversed(sizes), key=lambda size: _transposed_row_bytes(matrix, size))


def _transposed_row_bytes(matrix: CodedMatrix, block_size: int) -> int:
    blocks = -(-matrix.reduction // block_size)
    points = -(-blocks * matrix.bits // 8) if matrix.zero_point or not matrix.signed else 0
    scale_bytes = tensor_of(matrix.scale).dtype.bitwidth // 8
    return blocks * (block_size * matrix.bits // 8 + scale_bytes) + points


def _bytes_name(codes: ir.Value) -> str:
    return f"{codes.name}.bytes"


def _columns(values: npt.NDArray[Any], repeat: int) -> npt.NDArray[Any]:
    """Turn `[blocks, N]` into `[N, blocks]`, or `[N]` into `[N, repeat]`."""
    rows = values.T if values.ndim == 2 else values[:, np.newaxis]
    return np.ascontiguousarray(np.repeat(rows, repeat, axis=1))


def _initializer(graph: ir.Graph, name: str, make: Callable[[str], ir.TensorProtocol]) -> ir.Value:
    found = graph.initializers.get(name)
    return add_initializer(graph, name, make(name)) if found is None else found


def _bytes(matrix: CodedMatrix, name: str, store: WeightStore) -> ir.TensorProtocol:
    rows, columns = matrix.shape
    width = columns * matrix.bits // 8
    raw = reinterpret(tensor_of(matrix.codes), ir.DataType.UINT8, (rows, width), name)
    if not matrix.signed:
        return raw
    mask = np.uint8(_SIGN_BITS[matrix.bits])
    writer = store.open_tensor(name, ir.DataType.UINT8, (rows, width))
    step = max(1, _SLICE_BYTES // max(1, width))
    for start in range(0, rows, step):
        writer.write_slice(0, start, read_slice(raw, 0, start, min(start + step, rows)) ^ mask)
    return writer.finish()


def _points(matrix: CodedMatrix, blocks: int, name: str) -> ir.TensorProtocol:
    rows = matrix.shape[0]
    if matrix.zero_point is None:
        values = np.zeros((rows, blocks), np.uint8)
    else:
        values = _unsigned(matrix.zero_point, matrix.signed).reshape(rows, blocks)
    return ir.tensor(_pack_rows(values, matrix.bits), dtype=ir.DataType.UINT8, name=name)


def _unsigned(value: ir.Value, signed: bool) -> Bytes:
    """Return codes one per byte, moved to an unsigned range."""
    tensor = tensor_of(value)
    middle = 1 << (tensor.dtype.bitwidth - 1) if signed else 0
    return (read_all(tensor).astype(np.int16) + middle).astype(np.uint8)


def _pack_rows(values: Bytes, bits: int) -> Bytes:
    """Pack each row by itself, padded with zeros to whole bytes."""
    per_byte = 8 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte)))
    return pack(np.ascontiguousarray(padded), bits).reshape(values.shape[0], -1)
