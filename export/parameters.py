"""A module's tensors as initializers: shared ones once, moved ones without a copy in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.ir.dataflow import is_op

if TYPE_CHECKING:
    import torch

_KIND: Final = "pkg.torch.export.graph_signature.InputSpec.kind"
_DERIVED: Final = "qcompiler.derived"
"""Marks initializers made of parameters by moving elements, until the names are set."""
_LARGE_BUFFER: Final = 4096
_SMALL_BYTES: Final = 64
_PARTING: Final = ("Slice", "Split")
_MOVING: Final = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Concat", *_PARTING)

Array = npt.NDArray[Any]


def is_parameter(value: ir.Value | None) -> bool:
    """Whether a value is a parameter of the module, or a parameter with its elements moved.

    Buffers count when they are large: weights that are not trained are kept in them.
    """
    if value is None or value.const_value is None:
        return False
    kind = value.metadata_props.get(_KIND)
    large = kind == "BUFFER" and value.const_value.nbytes > _LARGE_BUFFER
    return kind == "PARAMETER" or large or _DERIVED in value.metadata_props


def refuse_without_values(model: ir.Model) -> None:
    """Raise ModelError where a tensor has a shape and no values, as on the meta device."""
    for name, value in model.graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if value.const_value is None or getattr(raw, "is_meta", False):
            message = "the tensor has no values"
            raise ModelError(message, where=name, hint="load the weights before exporting")


def merge_tied(model: ir.Model, state: Mapping[str, "torch.Tensor"]) -> None:
    """Make one initializer of parameters that are the same memory, with the first of their names.

    Args:
        model: As PyTorch's exporter returns it.
        state: The module's tensors by name, in its order.
    """
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        first.setdefault(_memory(tensor), name)
    kept: dict[Any, ir.Value] = {}
    initializers = model.graph.initializers
    for name, value in list(initializers.items()):
        key = _memory(getattr(value.const_value, "raw", None))
        if key is None:
            continue
        if key in kept:
            value.replace_all_uses_with(kept[key], replace_graph_outputs=True)
            del initializers[name]
            continue
        kept[key] = value
        canonical = first.get(key, name)
        if canonical != name and canonical not in initializers:
            value.name = canonical
            if value.const_value is not None:
                value.const_value.name = canonical


def _memory(tensor: Any) -> Any:
    """Return what two tensors have in common when they are the same memory, None if it has none."""
    if not hasattr(tensor, "data_ptr") or tensor.numel() == 0:
        return None
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def merge_small_constants(model: ir.Model) -> None:
    """Make one initializer of equal small constants that are no tensors of the module."""
    kept: dict[Any, ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or _KIND in value.metadata_props or tensor.nbytes > _SMALL_BYTES:
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        first = kept.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first, replace_graph_outputs=True)
            del model.graph.initializers[name]


def fold_moved_parameters(model: ir.Model) -> None:
    """Replace parameters behind nodes that only move elements by moved parameters.

    Before: y = MatMul(x, Transpose(w))
    After:  y = MatMul(x, w), where w is read transposed when it is saved

    A parameter that something else reads as well keeps its nodes: two layouts of it would be
    stored otherwise. Parts of a parameter (Slice, Split) add up to it, and are folded.
    """
    for node in list(model.graph):
        if node.op_type not in _MOVING or not is_op(node, node.op_type):
            continue
        if any(value is None or value.const_value is None for value in node.inputs):
            continue
        parameters = [value for value in node.inputs if is_parameter(value)]
        if parameters and all(_read_once(value) for value in parameters if value is not None):
            _fold(model.graph, node)
    _drop_unread(model.graph)


def _read_once(parameter: ir.Value) -> bool:
    """Whether folding the nodes that read a parameter leaves each of its elements stored once."""
    readers = [use.node for use in parameter.uses()]
    return not parameter.is_graph_output() and (
        len(readers) == 1 or all(is_op(reader, *_PARTING) for reader in readers)
    )


def _fold(graph: ir.Graph, node: ir.Node) -> None:
    shapes = [output.shape for output in node.outputs]
    if any(shape is None or not shape.is_static() for shape in shapes):
        return
    tensors = [value.const_value for value in node.inputs if value is not None]
    sources = [value for value in node.inputs if is_parameter(value)]
    whole = sources[0] if len(sources) == 1 and not is_op(node, *_PARTING) else None
    for index, output in enumerate(node.outputs):
        _replace(graph, output, _lazy(node, tensors, index), whole)
    graph.remove(node, safe=True)


def _lazy(
    node: ir.Node, tensors: Sequence[ir.TensorProtocol | None], index: int
) -> ir.TensorProtocol:
    """Return a tensor whose values are moved when they are asked for."""
    output = node.outputs[index]
    move = _evaluator(node)
    first = tensors[0]
    assert first is not None
    assert output.shape is not None

    def values() -> ir.TensorProtocol:
        arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
        return ir.Tensor(move(arrays)[index], dtype=first.dtype)

    return ir.LazyTensor(values, first.dtype, ir.Shape(output.shape.numpy()))


def _evaluator(node: ir.Node) -> Callable[[list[Array]], list[Array]]:
    """Return a function that computes a node; what can be a view of its input is one."""
    from onnx.reference import ReferenceEvaluator

    names = [f"input{index}" for index in range(len(node.inputs))]
    copy = ir.Node(
        node.domain,
        node.op_type,
        [ir.Value(name=name) for name in names],
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
    )
    for index, output in enumerate(copy.outputs):
        output.name = f"output{index}"
    proto = ir.serde.serialize_node(copy)

    def evaluate(arrays: list[Array]) -> list[Array]:
        results = ReferenceEvaluator(proto).run(None, dict(zip(names, arrays, strict=True)))
        return [np.asarray(result) for result in results]

    return evaluate


def _replace(
    graph: ir.Graph, output: ir.Value, tensor: ir.TensorProtocol, whole: ir.Value | None
) -> None:
    """Put an initializer in the place of a folded value.

    Where it holds one whole parameter, it takes over that parameter's name.
    """
    name = output.name or ""
    output.name = None
    if whole is not None and whole.name is not None:
        name = whole.name
        del graph.initializers[name]
        whole.name = None
    tensor.name = name
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=output.shape,
        const_value=tensor,
        metadata_props={_DERIVED: "1"},
    )
    graph.initializers[name] = value
    output.replace_all_uses_with(value, replace_graph_outputs=True)


def _drop_unread(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
