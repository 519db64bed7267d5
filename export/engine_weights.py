"""Where the weights of a graph lie in the engine that was built from it, and in which type.

An engine can be opened only where a processor runs it. What it holds can be looked for anywhere:
TensorRT-RTX stores weights as they are, or turned, so a row of each weight is looked for as it was
planned and as it would be if the builder had decoded it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import all_graphs, constant_of, int_attribute, is_op
from qcompiler.ir.weights import read_all, read_slice

Array = npt.NDArray[Any]

_LEAST_BYTES: Final = 1024
"""Smaller constants are parameters of kernels, or are folded."""
_ROWS: Final = 128
"""Rows of a weight that are read: along a column, so many 2-bit codes make a needle."""
_NEEDLE: Final = 32
"""Elements that are looked for; of codes below 8 bits, bytes."""
_LEAST_DISTINCT: Final = 5
"""Of these elements so many must differ: zeros are everywhere."""
_WORD: Final = 8
"""Bytes by which the places where a needle may begin are found."""
_ALIGNMENT: Final = 4
"""Weights began at a multiple of 8 bytes in engines of transformers, and of 4 in those of CNNs."""
_CHUNK: Final = 1 << 23
_INT8: Final = ir.DataType.INT8
_DECODED: Final = {
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    ir.DataType.FLOAT: np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True)
class WeightFinding:
    """What became of one weight.

    Attributes:
        name: The initializer.
        planned: The type the graph holds it in.
        found: The types it was found in; empty where the engine arranges it in another way.
        elements: Its elements.
    """

    name: str
    planned: ir.DataType
    found: tuple[ir.DataType, ...]
    elements: int

    @property
    def planned_bytes(self) -> int:
        """What it takes in the graph, without scales."""
        return -(-self.elements * self.planned.bitwidth // 8)

    @property
    def wider(self) -> ir.DataType | None:
        """The widest type it was found in, None where that is not wider than planned."""
        widest = max(self.found, key=lambda dtype: dtype.bitwidth, default=self.planned)
        return widest if widest.bitwidth > self.planned.bitwidth else None


def find_weights(engine: Path, model: ir.Model) -> tuple[WeightFinding, ...]:
    """Look for every weight of a graph in an engine.

    Args:
        engine: The engine.
        model: The graph that it was built from.

    Returns:
        One finding for each constant of 1 KiB and more that is not a scale, in graph order.

    Raises:
        ModelError: External data cannot be read.
    """
    needles: dict[bytes, set[tuple[ir.Value, ir.DataType]]] = {}
    weights = list(_weights(model))
    for value in weights:
        for dtype, needle in _needles(value):
            needles.setdefault(needle, set()).add((value, dtype))
    found: dict[ir.Value, set[ir.DataType]] = {value: set() for value in weights}
    for needle in _present(engine, list(needles)):
        for value, dtype in needles[needle]:
            found[value].add(dtype)
    return tuple(_finding(value, found[value]) for value in weights)


def _finding(value: ir.Value, found: set[ir.DataType]) -> WeightFinding:
    tensor = value.const_value
    assert tensor is not None
    types = tuple(sorted(found, key=lambda dtype: dtype.bitwidth))
    return WeightFinding(value.name or "", tensor.dtype, types, tensor.size)


def _weights(model: ir.Model) -> Iterator[ir.Value]:
    scales = _scales(model)
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            tensor = constant_of(value)
            if tensor is None or value in scales or tensor.nbytes < _LEAST_BYTES:
                continue
            # Integers of the source model are indices and shapes.
            if tensor.dtype in _DECODED or _decoder(value) is not None:
                yield value


def _scales(model: ir.Model) -> set[ir.Value | None]:
    return {
        value
        for node in model.graph.all_nodes()
        if is_op(node, "QuantizeLinear", "DequantizeLinear")
        for value in node.inputs[1:]
    }


def _decoder(value: ir.Value) -> ir.Node | None:
    nodes = (use.node for use in value.uses() if use.idx == 0)
    return next((node for node in nodes if is_op(node, "DequantizeLinear")), None)


def _needles(value: ir.Value) -> Iterator[tuple[ir.DataType, bytes]]:
    """Yield a piece of a weight in every type and arrangement that it may have in an engine."""
    tensor = value.const_value
    assert tensor is not None
    shape = tuple(tensor.shape.numpy())
    if len(shape) == 0 or 0 in shape:
        return
    rows = min(_ROWS, shape[0])
    stored = read_slice(tensor, 0, 0, rows)
    decoder = _decoder(value)
    forms: dict[ir.DataType, Array] = {tensor.dtype: stored}
    if decoder is not None:
        if tensor.dtype.bitwidth < _INT8.bitwidth:
            forms[_INT8] = stored.astype(np.int8)
        forms |= _decoded(decoder, stored)
    elif tensor.dtype != ir.DataType.FLOAT:
        forms[ir.DataType.FLOAT] = stored.astype(np.float32)
    for dtype, values in forms.items():
        count = max(_NEEDLE, _NEEDLE * 8 // dtype.bitwidth)
        for line in _lines(values, count):
            yield dtype, bytes(ir.tensor(line, dtype=dtype).tobytes())


def _decoded(decoder: ir.Node, codes: Array) -> Mapping[ir.DataType, Array]:
    """Return what a DequantizeLinear makes of the first codes, in every float type."""
    scale = constant_of(decoder.inputs[1])
    if scale is None:
        return {}
    factors = read_all(scale).astype(np.float32)
    block, axis = int_attribute(decoder, "block_size", 0), int_attribute(decoder, "axis", 1)
    axis = axis + codes.ndim if axis < 0 else axis
    if factors.ndim == 1 and factors.size > 1:
        factors = factors.reshape([-1 if each == axis else 1 for each in range(codes.ndim)])
    elif block:
        factors = np.repeat(factors, block, axis)
    # The codes are the first of their axis only.
    cut = tuple(slice(size) if factors.ndim else slice(None) for size in codes.shape)
    values = codes.astype(np.float32) * (factors[cut] if factors.ndim == codes.ndim else factors)
    with np.errstate(over="ignore"):
        return {dtype: values.astype(kind) for dtype, kind in _DECODED.items()}


def _lines(values: Array, count: int) -> Iterator[Array]:
    """Yield a row, a column, and of a convolution's weight a row with channels last."""
    matrix = values.reshape(values.shape[0], -1)
    yield from _first_that_differs(matrix, count)
    yield from _first_that_differs(matrix.T, count)
    if values.ndim > 2:
        last = np.moveaxis(values, 1, -1).reshape(values.shape[0], -1)
        yield from _first_that_differs(last, count)


def _first_that_differs(matrix: Array, count: int) -> Iterator[Array]:
    """Yield the beginning of the first row that could not be just anything; none if all could."""
    if matrix.shape[1] < count:
        return
    for row in matrix[:_ROWS]:
        piece = np.ascontiguousarray(row[:count])
        if len(np.unique(piece.astype(np.float32))) >= _LEAST_DISTINCT:
            yield piece
            return


def _present(engine: Path, needles: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the needles that a file holds at a multiple of 4 bytes."""
    if not needles:
        return
    content = np.memmap(engine, np.uint8, mode="r")
    starts: dict[int, list[bytes]] = {}
    for needle in needles:
        starts.setdefault(int.from_bytes(needle[:_WORD], "little"), []).append(needle)
    sought = np.array(sorted(starts), np.uint64)
    for first in range(0, len(content), _CHUNK):
        for shift in range(0, _WORD, _ALIGNMENT):
            piece = content[first + shift : first + shift + _CHUNK]
            words = piece[: len(piece) // _WORD * _WORD].view("<u8")
            places = np.minimum(np.searchsorted(sought, words), len(sought) - 1)
            for hit in np.flatnonzero(sought[places] == words):
                at = first + shift + int(hit) * _WORD
                for needle in starts[int(words[hit])]:
                    if content[at : at + len(needle)].tobytes() == needle:
                        yield needle
