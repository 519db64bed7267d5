"""Computes the results of one node whose inputs are all constant.

ONNX Runtime computes them: the bits are those the compiled model would compute at run time, a
one-node session takes about 0.4 ms, and large tensors go in without a copy. ONNX's reference
evaluator follows NumPy's rounding instead, and is slow where NumPy has no kernel (Conv, Resize).
What only moves or relabels bytes is done here, so that large weights are never read whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from qcompiler.execution.sessions import session_options
from qcompiler.ir.dataflow import ints_attribute
from qcompiler.ir.shapes import infer_shapes
from qcompiler.ir.weights import WeightStore, nbytes_of, read_all, read_slice, reinterpret

_INLINE_BYTES: Final = 1000
"""Inputs up to this size are initializers of the session, as shape inference needs values."""
_SLICE_BYTES: Final = 32 << 20
_IR_VERSION: Final = 10
_RELABELLING: Final = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_MOVING: Final = (
    *_RELABELLING,
    *("Transpose", "Concat", "Slice", "Gather", "GatherElements", "GatherND", "Split"),
    *("Expand", "Tile", "DepthToSpace", "SpaceToDepth"),
)
_STAND_INS: Final = {16: ir.DataType.UINT16, 8: ir.DataType.UINT8}
_NUMPY_KINDS: Final = "biuf"


class CannotComputeError(Exception):
    """A node's results cannot be computed here; the message says why, as a clause."""


@dataclass(frozen=True, slots=True)
class ResultType:
    """What is known of a result before it is computed.

    Attributes:
        dtype: Element type.
        shape: Its sizes, or None where they depend on values.
    """

    dtype: ir.DataType
    shape: tuple[int, ...] | None

    @property
    def nbytes(self) -> int | None:
        """Bytes it takes in a file."""
        return None if self.shape is None else nbytes_of(self.shape, self.dtype)


Tensors = Sequence[ir.TensorProtocol | None]


def infer_results(
    node: ir.Node, inputs: Tensors, opsets: Mapping[str, int]
) -> list[ResultType | None]:
    """Return type and shape of every output that is read, without computing anything.

    Raises:
        CannotComputeError: An output is not a tensor, or its type is not known.
    """
    model = _one_node_model(node, inputs, opsets)
    infer_shapes(model)
    found: list[ResultType | None] = []
    for original, output in zip(node.outputs, model.graph[0].outputs, strict=True):
        if not _is_read(original):
            found.append(None)
            continue
        if not isinstance(output.type, ir.TensorType):
            message = "its result is not a tensor, or of a type that cannot be inferred"
            raise CannotComputeError(message)
        shape = output.shape
        sizes = shape.numpy() if shape is not None and shape.is_static() else None
        found.append(ResultType(output.type.dtype, sizes))
    return found


def compute_results(
    node: ir.Node, inputs: Tensors, opsets: Mapping[str, int], store: WeightStore
) -> list[ir.TensorProtocol | None]:
    """Compute every output that is read; large ones lie in the store.

    Args:
        node: A node of a standard op without bodies.
        inputs: The constants at its inputs.
        opsets: The model's opset imports.
        store: Where results go.

    Raises:
        CannotComputeError: ONNX Runtime has no way to run it.
    """
    types = infer_results(node, inputs, opsets)
    moved = _move(node, inputs, types, store)
    if moved is not None:
        return [moved]
    results = iter(_compute(node, inputs, types, opsets))
    made: list[ir.TensorProtocol | None] = []
    for output, result in zip(node.outputs, types, strict=True):
        if result is None:
            made.append(None)
        else:
            made.append(store.put(output.name or "", next(results), result.dtype))
    return made


def _is_read(value: ir.Value) -> bool:
    return bool(value.name) and (bool(value.uses()) or value.is_graph_output())


def _move(
    node: ir.Node, inputs: Tensors, types: Sequence[ResultType | None], store: WeightStore
) -> ir.TensorProtocol | None:
    """Give a tensor in a file another shape, or transpose it slice by slice."""
    source, result = inputs[0] if inputs else None, types[0]
    if not isinstance(source, ir.ExternalTensor) or result is None or result.shape is None:
        return None
    name = node.outputs[0].name or ""
    if node.op_type in _RELABELLING:
        return reinterpret(source, source.dtype, result.shape, name)
    swaps = node.op_type == "Transpose" and ints_attribute(node, "perm") in (None, (1, 0))
    if not swaps or len(result.shape) != 2 or result.dtype.bitwidth < 8:
        return None
    rows, columns = result.shape
    step = max(1, _SLICE_BYTES // max(1, nbytes_of((columns,), result.dtype)))
    writer = store.open_tensor(name, result.dtype, result.shape)
    for start in range(0, rows, step):
        piece = read_slice(source, 1, start, min(rows, start + step))
        writer.write_slice(0, start, np.ascontiguousarray(piece.T))
    return writer.finish()


def _compute(
    node: ir.Node,
    inputs: Tensors,
    types: Sequence[ResultType | None],
    opsets: Mapping[str, int],
) -> list[npt.NDArray[Any]]:
    arrays = [None if tensor is None else read_all(tensor) for tensor in inputs]
    foreign = {
        tensor.dtype for tensor in inputs if tensor is not None and not _has_numpy(tensor.dtype)
    } | {result.dtype for result in types if result is not None and not _has_numpy(result.dtype)}
    if not foreign:
        return _run(node, arrays, inputs, opsets)
    if node.op_type == "Cast" and types[0] is not None and arrays[0] is not None:
        # Rounds half to even, as ONNX Runtime does; overflow to infinity likewise.
        return [arrays[0].astype(types[0].dtype.numpy())]
    if node.op_type not in _MOVING:
        names = ", ".join(sorted(dtype.name for dtype in foreign))
        message = f"ONNX Runtime's CPU kernels do not compute in {names}"
        raise CannotComputeError(message)
    # Bytes are moved alike whatever they mean.
    stand_ins = [None if array is None else _as_stand_in(array) for array in arrays]
    tensors = [None if array is None else ir.tensor(array) for array in stand_ins]
    results = _run(node, stand_ins, tensors, opsets)
    kept = [result for result in types if result is not None]
    return [_as_stored(values, result) for values, result in zip(results, kept, strict=True)]


def _has_numpy(dtype: ir.DataType) -> bool:
    return dtype.numpy().kind in _NUMPY_KINDS and dtype.bitwidth >= 8


def _as_stand_in(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype.kind in _NUMPY_KINDS:
        return array
    return array.view(_STAND_INS[8 * array.dtype.itemsize].numpy())


def _as_stored(values: npt.NDArray[Any], result: ResultType) -> npt.NDArray[Any]:
    """Return moved bytes in the type `WeightStore.put` takes: codes below 8 bits as integers."""
    typed = values.view(result.dtype.numpy())
    if result.dtype.bitwidth >= 8:
        return typed
    return typed.astype(np.int8 if result.dtype.is_signed() else np.uint8)


def _run(
    node: ir.Node,
    arrays: Sequence[npt.NDArray[Any] | None],
    tensors: Tensors,
    opsets: Mapping[str, int],
) -> list[npt.NDArray[Any]]:
    model = _one_node_model(node, tensors, opsets)
    infer_shapes(model)
    feeds = {
        f"input{index}": array
        for index, array in enumerate(arrays)
        if array is not None and f"input{index}" not in model.graph.initializers
    }
    options = session_options(optimize=False, threads=1)  # sums must not depend on the cores
    try:
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results = session.run(None, feeds)
    except Exception as error:  # its exceptions share no base class but this one
        message = f"ONNX Runtime cannot run it: {str(error).strip().splitlines()[0]}"
        raise CannotComputeError(message) from error
    if not all(isinstance(result, np.ndarray) for result in results):
        message = "its result is not a tensor"
        raise CannotComputeError(message)
    return list(results)


def _one_node_model(node: ir.Node, tensors: Tensors, opsets: Mapping[str, int]) -> ir.Model:
    """Return a model of the node alone; small constants are in it, large ones are its inputs."""
    values: list[ir.Value | None] = []
    for index, tensor in enumerate(tensors):
        if tensor is None:
            values.append(None)
            continue
        small = tensor.nbytes <= _INLINE_BYTES and _has_numpy(tensor.dtype)
        value = ir.Value(
            name=f"input{index}",
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=ir.tensor(read_all(tensor), dtype=tensor.dtype) if small else None,
        )
        values.append(value)
    copy = ir.Node(
        node.domain, node.op_type, values, list(node.attributes.values()),
        num_outputs=len(node.outputs),
    )  # fmt: skip
    for index, (original, output) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
        output.name = f"output{index}" if _is_read(original) else ""
    given = [value for value in values if value is not None]
    graph = ir.Graph(
        [value for value in given if value.const_value is None],
        [output for output in copy.outputs if output.name],
        nodes=[copy],
        initializers=[value for value in given if value.const_value is not None],
        opset_imports=dict(opsets),
        name="constant",
    )
    return ir.Model(graph, ir_version=_IR_VERSION)
