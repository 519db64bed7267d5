"""Every place of a model that holds a tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class TensorSite:
    """One tensor of a model and how to put another in its place.

    Attributes:
        tensor: The tensor that lies there now; tied weights appear at several sites.
        replace: Puts another tensor of the same shape and type there.
        graph: The graph whose initializer it is; None for an attribute.
    """

    tensor: ir.TensorProtocol
    replace: Callable[[ir.TensorProtocol], None]
    graph: ir.Graph | None = None


def tensor_sites(model: ir.Model) -> Iterator[TensorSite]:
    """Yield the sites of graph, subgraphs and functions: initializers first, then attributes."""
    for graph in (*model.graphs(), *_function_subgraphs(model)):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield TensorSite(value.const_value, _initializer_setter(value), graph)
    bodies: tuple[ir.Graph | ir.Function, ...] = (model.graph, *model.functions.values())
    for body in bodies:
        for node in ir.traversal.RecursiveGraphIterator(body):
            for attribute in tuple(node.attributes.values()):
                yield from _attribute_sites(node, attribute)


def _function_subgraphs(model: ir.Model) -> Iterator[ir.Graph]:
    for function in model.functions.values():
        yield from function.subgraphs()


def _attribute_sites(node: ir.Node, attribute: ir.Attr) -> Iterator[TensorSite]:
    if attribute.is_ref() or attribute.value is None:
        return
    if attribute.type == ir.AttributeType.TENSOR:
        yield TensorSite(attribute.as_tensor(), _attribute_setter(node, attribute.name))
    elif attribute.type == ir.AttributeType.TENSORS:
        for index, tensor in enumerate(attribute.as_tensors()):
            yield TensorSite(tensor, _attribute_setter(node, attribute.name, index))


def _initializer_setter(value: ir.Value) -> Callable[[ir.TensorProtocol], None]:
    def replace(tensor: ir.TensorProtocol) -> None:
        value.const_value = tensor

    return replace


def _attribute_setter(
    node: ir.Node, name: str, index: int | None = None
) -> Callable[[ir.TensorProtocol], None]:
    def replace(tensor: ir.TensorProtocol) -> None:
        old = node.attributes[name]
        if index is None:
            node.attributes[name] = ir.AttrTensor(name, tensor, doc_string=old.doc_string)
            return
        tensors = list(old.as_tensors())
        tensors[index] = tensor
        node.attributes[name] = ir.AttrTensors(name, tensors, doc_string=old.doc_string)

    return replace
