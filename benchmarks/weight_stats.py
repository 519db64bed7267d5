"""How large the weights of a model file are, and how many a peer quantized."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx

_RANK = 2
_SCALED_OPS = ("DequantizeLinear", "GatherBlockQuantized", "MatMulNBits")


def file_bytes(path: Path) -> int:
    """Return the size of a model file and its external data together."""
    return sum(file.stat().st_size for file in _files(path))


def digest(path: Path) -> str:
    """Return the first 16 hex digits of a sha256 over a model file and its external data."""
    sha256 = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as stream:
            sha256.update(hashlib.file_digest(stream, "sha256").digest())
    return sha256.hexdigest()[:16]


def weight_bytes(path: Path) -> int:
    """Return the bytes of all constants: initializers and Constant nodes, in all bodies."""
    return sum(_bytes(tensor) for tensor in _tensors(_load(path).graph))


def bytes_by_type(path: Path) -> dict[str, int]:
    """Return the bytes of all constants by the name of their type, in all bodies."""
    found: Counter[str] = Counter()
    for tensor in _tensors(_load(path).graph):
        found[onnx.TensorProto.DataType.Name(tensor.data_type)] += _bytes(tensor)
    return dict(found)


def float_elements(path: Path) -> int:
    """Return how many elements the float constants of two or more axes have, scales apart."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    graph = _load(path).graph
    scales = {
        name for node in _nodes(graph) if node.op_type in _SCALED_OPS for name in node.input[1:]
    }
    return sum(
        math.prod(tensor.dims)
        for tensor in _tensors(graph)
        if tensor.data_type in floats and len(tensor.dims) >= _RANK and tensor.name not in scales
    )


def op_counts(path: Path) -> Counter[str]:
    """Count the nodes of each op type, in all bodies."""
    return Counter(node.op_type for node in _nodes(_load(path).graph))


def matmul_nbits(path: Path) -> dict[str, float]:
    """Look at the MatMulNBits nodes of a peer's model.

    Returns:
        `nodes`, their number; `elements` of their weights; `bytes` of codes, scales and zero
        points; `bits` of a code (0 without such nodes).
    """
    graph = _load(path).graph
    sizes = {tensor.name: _bytes(tensor) for tensor in _tensors(graph)}
    found = {"nodes": 0.0, "elements": 0.0, "bytes": 0.0, "bits": 0.0}
    for node in _nodes(graph):
        if node.op_type != "MatMulNBits":
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        found["nodes"] += 1
        found["elements"] += attributes["K"] * attributes["N"]
        found["bytes"] += sum(sizes[name] for name in node.input[1:4] if name)
        found["bits"] = float(attributes.get("bits", 4))
    return found


def with_accuracy_level(path: Path, level: int) -> Path:
    """Write a copy beside `path` whose MatMulNBits nodes compute at `level`; return its path."""
    model = _load(path)
    for node in _nodes(model.graph):
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    copy = path.with_name(f"{path.stem}.level{level}.onnx")
    onnx.save(model, copy)
    return copy


def _files(path: Path) -> list[Path]:
    # Both this compiler and the benchmarks' exporter name the data file after the model.
    data = path.with_name(f"{path.name}.data")
    return [path, data] if data.exists() else [path]


def _load(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def _bytes(tensor: onnx.TensorProto) -> int:
    elements = int(math.prod(tensor.dims))
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return -(-elements // 2)
    if tensor.data_type in (onnx.TensorProto.INT2, onnx.TensorProto.UINT2):
        return -(-elements // 4)
    if tensor.data_type == onnx.TensorProto.STRING:
        return 0
    return elements * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            for body in bodies:
                yield from _graphs(body)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for inner in _graphs(graph):
        yield from inner.node


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for inner in _graphs(graph):
        yield from inner.initializer
        for node in inner.node:
            if node.op_type == "Constant":
                yield from (a.t for a in node.attribute if a.HasField("t"))
