"""Computes at compile time what does not depend on the model's inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.execution.constant_nodes import (
    CannotComputeError,
    ResultType,
    compute_results,
    infer_results,
)
from qcompiler.ir.dataflow import (
    ONNX_DOMAINS,
    RANDOM_OPS,
    all_nodes,
    bodies_of,
    constant_of,
    int_attribute,
    is_op,
    node_name,
)
from qcompiler.ir.editing import (
    drop_unused_initializers,
    is_used,
    replace_by_constants,
)
from qcompiler.ir.shapes import infer_shapes
from qcompiler.ir.weights import read_all
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

Array = npt.NDArray[Any]

_MAX_BYTES: Final = (1 << 31) - 1
_MAX_ROUNDS: Final = 16
_BOUNDED: Final = ("NonZero", "Compress", "Unique")
"""Ops whose result has a size that depends on values, yet is bounded by that of their input."""
_HALF_TYPES: Final = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, slots=True)
class FoldConstantsOptions:
    """Options of `fold-constants`.

    Attributes:
        growth_bytes: How many bytes a folded node may add to the model: what its results take,
            less the constants that nobody needs any more.
    """

    growth_bytes: int = 1 << 18


class FoldConstants(Pass):
    """Compute nodes whose inputs are constant, and shapes that are known, and keep the results.

    Before: y = MatMul(x, Transpose(w)); z = Reshape(y, Concat(Shape(x)[0:1], [8]))
    After:  y = MatMul(x, w_transposed); z = Reshape(y, [4, 8]), where x has 4 rows
    Refuses: DequantizeLinear, as quantized weights stay integers; results that make the model
        larger (of a weight that others read too, of Expand, Tile, Range ...), save for Casts of
        half precision weights to float32; random ops; constants beyond 2 GiB; results that are
        not tensors; what ONNX Runtime cannot run.
    """

    name: ClassVar = "fold-constants"
    consumes: ClassVar = Stage.IMPORTED
    produces: ClassVar = Stage.IMPORTED
    numerics: ClassVar = Numerics.REORDERED
    # ONNX Runtime computes the constants, with the kernels it would use at run time; those of
    # another machine may sum in another order.
    tolerance: ClassVar = 1e-6

    options: FoldConstantsOptions

    def __init__(self, options: FoldConstantsOptions | None = None) -> None:
        self.options = options or FoldConstantsOptions()

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fold until nothing is left to fold."""
        rewrites: list[Rewrite] = []
        skips: dict[str, Skip] = {}
        for _ in range(_MAX_ROUNDS):
            infer_shapes(model)
            skips.clear()
            found = list(self._sweep(model, context, skips))
            rewrites.extend(found)
            if not found:
                break
        return PassResult(tuple(rewrites), tuple(skips.values()))

    def _sweep(
        self, model: ir.Model, context: PassContext, skips: dict[str, Skip]
    ) -> Iterator[Rewrite]:
        """Fold once in graph order, so that a chain folds in one go."""
        nodes = list(all_nodes(model))
        with context.progress.task("folding constants", len(nodes)) as advance:
            for node in nodes:
                advance(1)
                label = node_name(node)
                try:
                    if self._fold(node, model, context):
                        yield Rewrite(self.name, label, node.op_type)
                except CannotComputeError as refusal:
                    skips[label] = Skip(self.name, label, str(refusal))

    def _fold(self, node: ir.Node, model: ir.Model, context: PassContext) -> bool:
        """Fold one node if its results are constant; say whether it was done.

        Raises:
            CannotComputeError: The results are constant, and stay computed at run time.
        """
        if not any(is_used(output) for output in node.outputs):
            return False
        dims = _known_dims(node)
        if dims is not None:
            sources = list(node.inputs)
            name = node.outputs[0].name or ""
            replace_by_constants(node, [context.store.put(name, dims, ir.DataType.INT64)])
            drop_unused_initializers(sources)
            return True
        if not _is_constant(node):
            return False
        inputs = [constant_of(value) for value in node.inputs]
        self._check(node, inputs, model)
        results = compute_results(node, inputs, model.opset_imports, context.store)
        sources = list(node.inputs)
        replace_by_constants(node, results)
        drop_unused_initializers(sources)
        return True

    def _check(
        self, node: ir.Node, inputs: list[ir.TensorProtocol | None], model: ir.Model
    ) -> None:
        """Raise CannotComputeError where folding is possible and not wanted."""
        if is_op(node, "DequantizeLinear"):
            message = "quantized weights stay integers"
            raise CannotComputeError(message)
        if is_op(node, *RANDOM_OPS):
            message = "its result is random, and differs from run to run"
            raise CannotComputeError(message)
        sizes = [tensor.nbytes for tensor in inputs if tensor is not None]
        if any(tensor is not None and tensor.dtype == ir.DataType.STRING for tensor in inputs):
            message = "texts are not folded"
            raise CannotComputeError(message)
        if max(sizes) > _MAX_BYTES:
            message = "its input is larger than 2 GiB"
            raise CannotComputeError(message)
        results = infer_results(node, inputs, model.opset_imports)
        total = sum(_bytes_of(result, node, max(sizes)) for result in results if result)
        if total > _MAX_BYTES:
            message = f"its result takes {total} bytes, more than 2 GiB"
            raise CannotComputeError(message)
        self._check_growth(node, total)

    def _check_growth(self, node: ir.Node, total: int) -> None:
        values = list(dict.fromkeys(value for value in node.inputs if value is not None))
        shared = [value for value in values if _other_reader(value, node) is not None]
        freed = sum(_nbytes(value) for value in values if value not in shared)
        limit = self.options.growth_bytes
        if total - freed <= limit or (not shared and _widens_half(node)):
            return
        every = sum(_nbytes(value) for value in values)
        if shared and total - every <= limit:
            kept = max(shared, key=_nbytes)
            message = (
                f"{kept.name} is also read by {_other_reader(kept, node)}, and folding would "
                "store it twice"
            )
        else:
            message = (
                f"its result takes {total} bytes and its inputs {every}; a folded node may add "
                f"{limit} bytes"
            )
        raise CannotComputeError(message)


def _is_constant(node: ir.Node) -> bool:
    """Whether a node is a standard op that reads constants only, and something at all."""
    if node.domain not in ONNX_DOMAINS or is_op(node, "Constant") or any(bodies_of(node)):
        return False
    given = [value for value in node.inputs if value is not None]
    return bool(given) and all(constant_of(value) is not None for value in given)


def _known_dims(node: ir.Node) -> Array | None:
    """Return what a node that reads shapes gives, where the shape is known where it looks.

    Covers Shape, Size, and Gather or Slice of a Shape.
    """
    if is_op(node, "Shape"):
        return _all_known(_dims_of_shape(node))
    if is_op(node, "Size"):
        dims = _all_known(_dims_of(node.inputs[0]))
        return None if dims is None else np.array(np.prod(dims), np.int64)
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if source is None or not is_op(source, "Shape"):
        return None
    dims = _dims_of_shape(source)
    if dims is None:
        return None
    if is_op(node, "Gather"):
        return _gathered(dims, constant_of(node.inputs[1]))
    return _sliced(dims, node) if is_op(node, "Slice") else None


def _gathered(dims: Array, picked: ir.TensorProtocol | None) -> Array | None:
    if picked is None:
        return None
    indices = read_all(picked)
    if np.any(indices < -len(dims)) or np.any(indices >= len(dims)):
        return None
    return _all_known(np.asarray(dims[indices], object))


def _sliced(dims: Array, node: ir.Node) -> Array | None:
    """Apply a Slice of one axis; its ends are clamped as Python's are."""
    bounds = [constant_of(value) for value in node.inputs[1:]]
    if len(bounds) < 2 or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    numbers = [int(read_all(bound).reshape(-1)[0]) for bound in bounds if bound is not None]
    step = numbers[3] if len(numbers) > 3 else 1
    return _all_known(dims[numbers[0] : numbers[1] : step]) if step > 0 else None


def _dims_of_shape(node: ir.Node) -> Array | None:
    """Return the sizes a Shape node gives, None for those not known."""
    dims = _dims_of(node.inputs[0])
    if dims is None:
        return None
    # Shape-15 clamps both ends to the rank, as Python's slices do.
    return dims[int_attribute(node, "start", 0) : int_attribute(node, "end", len(dims))]


def _dims_of(value: ir.Value | None) -> Array | None:
    """Return the sizes of a value as an array of objects, None for those not known."""
    if value is None or value.shape is None:
        return None
    dims = np.empty(len(value.shape), object)
    dims[:] = [dim if isinstance(dim, int) else None for dim in value.shape]
    return dims


def _all_known(dims: Array | None) -> Array | None:
    if dims is None or any(dim is None for dim in dims.reshape(-1)):
        return None
    return dims.astype(np.int64)


def _bytes_of(result: ResultType, node: ir.Node, largest_input: int) -> int:
    if result.nbytes is not None:
        return result.nbytes
    if is_op(node, *_BOUNDED):
        rank = 8  # NonZero gives one int64 per element and axis
        return largest_input * 8 * rank
    message = "the size of its result is not known before it is computed"
    raise CannotComputeError(message)


def _nbytes(value: ir.Value) -> int:
    tensor = constant_of(value)
    return 0 if tensor is None else tensor.nbytes


def _other_reader(value: ir.Value, node: ir.Node) -> str | None:
    """Return who needs a constant beside `node` and nodes that compute the same from it."""
    for user in value.consumers():
        if user is not node and not _same_computation(user, node):
            return node_name(user)
    if value.is_graph_output():
        return f"the caller, as output {value.name}"
    return None


def _same_computation(first: ir.Node, second: ir.Node) -> bool:
    return (
        first.op_identifier() == second.op_identifier()
        and list(first.inputs) == list(second.inputs)
        and dict(first.attributes) == dict(second.attributes)
    )


def _widens_half(node: ir.Node) -> bool:
    """Whether a node turns half precision constants into float32, which is all it can be for."""
    if not is_op(node, "Cast", "CastLike") or node.inputs[0] is None:
        return False
    source, output = node.inputs[0], node.outputs[0]
    return source.dtype in _HALF_TYPES and output.dtype == ir.DataType.FLOAT
