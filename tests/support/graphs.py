"""Small models for tests: ONNX text for the graph, NumPy arrays for the weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

Array = npt.NDArray[Any]


def build(text: str, weights: Mapping[str, Any] | None = None, *, opset: int = 21) -> ir.Model:
    """Parse a model from ONNX text and give it weights.

    Args:
        text: `name (inputs) => (outputs) { nodes }`, functions after it; a text that starts with
            `<` has its own header. Never write 4-bit literals in it: the parser packs them wrongly.
        weights: Initializers by name, as arrays or `ir` tensors. `"body/name"` puts one into the
            If/Loop/Scan body of that graph name.
        opset: Version of the standard opset for a text without a header.
    """
    header = "" if text.lstrip().startswith("<") else _header(opset)
    proto = onnx.parser.parse_model(header + text)
    for name, values in (weights or {}).items():
        place, _, short = name.rpartition("/")
        tensor = as_tensor(values, short)
        _graph_proto(proto.graph, place).initializer.append(ir.serde.serialize_tensor(tensor))
    return ir.from_proto(proto)


def as_tensor(values: Any, name: str) -> ir.TensorProtocol:
    """Return an array or tensor as a tensor of this name."""
    if isinstance(values, ir.TensorProtocol):
        values.name = name
        return values
    return ir.tensor(np.asarray(values), name=name)


def random_array(*shape: int, dtype: npt.DTypeLike = np.float32, seed: int = 0) -> Array:
    """Return standard normal values, the same for the same seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def externalize(model: ir.Model, folder: Path) -> ir.Model:
    """Save a model with all weights in one data file, and load it with its weights unread."""
    path = folder / "external.onnx"
    ir.save(model, path, external_data="external.data", size_threshold_bytes=0)
    return ir.load(path)


def serialized(model: ir.Model) -> bytes:
    """Return the bytes of a model, the same for equal models."""
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def op_types(model: ir.Model) -> list[str]:
    """Return the op type of every node in graph order, those of bodies after their owner."""
    return [node.op_type for node in model.graph.all_nodes()]


def node_named(model: ir.Model, name: str) -> ir.Node:
    """Return the node of this name, wherever it is."""
    found = [node for node in model.graph.all_nodes() if node.name == name]
    assert len(found) == 1, f"{len(found)} nodes are called {name!r}"
    return found[0]


def body_of(model: ir.Model, name: str) -> ir.Graph:
    """Return the If/Loop/Scan body of this graph name."""
    found = [graph for graph in model.graph.subgraphs() if graph.name == name]
    assert len(found) == 1, f"{len(found)} bodies are called {name!r}"
    return found[0]


def initializer(model: ir.Model, name: str) -> Array:
    """Return the values of an initializer of the main graph."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def _header(opset: int) -> str:
    return f'<ir_version: 10, opset_import: ["" : {opset}]>\n'


def _graph_proto(graph: onnx.GraphProto, place: str) -> onnx.GraphProto:
    found = [body for body in _with_bodies(graph) if not place or body.name == place]
    assert found, f"no body is called {place!r}"
    return found[0]


def _with_bodies(graph: onnx.GraphProto) -> Sequence[onnx.GraphProto]:
    graphs = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                graphs.extend(_with_bodies(attribute.g))
    return graphs
