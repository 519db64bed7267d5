"""Whether a parsed ONNX model is consistent, checked before a graph is built of it.

Names, versions, schemas and sizes only: element values are never looked at, and nothing is
allocated by a number that stands in the file.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import onnx
import onnx.defs
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.ir.dataflow import standard_domain
from qcompiler.ir.external_files import proto_tensors

MIN_OPSET = 7
_MIN_IR_VERSION = 3
_MAX_RANK = 64
_MAX_ELEMENTS = 1 << 62
_STANDARD = ("", "ai.onnx", "ai.onnx.ml")
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_AGAIN = "export the model again"


@dataclass(frozen=True, slots=True)
class _Signature:
    """What the ONNX standard says about one operator at one version."""

    attributes: dict[str, int]
    required: frozenset[str]
    inputs: tuple[int, int]
    outputs: tuple[int, int]


@dataclass(slots=True)
class _Checker:
    """State of one check: where messages point to, and what the model declares."""

    where: str
    functions: frozenset[tuple[str, str]]
    signatures: dict[tuple[str, str, int], _Signature | None] = field(default_factory=dict)

    def refuse(self, message: str, hint: str = _AGAIN) -> NoReturn:
        raise ModelError(message, where=self.where, hint=hint)


def check_model(proto: onnx.ModelProto, where: str) -> None:
    """Refuse a model that is not consistent.

    Nodes may come in any order that has no cycle. A dimension of -1 of a graph input or value
    is what some exporters write for an unknown one, and is made unknown here.

    Args:
        proto: The parsed file; external data is not looked at.
        where: The file, for messages.

    Raises:
        ModelError: What is wrong and where.
    """
    checker = _Checker(where, frozenset((f.domain, f.name) for f in proto.functions))
    opsets = _check_versions(checker, proto)
    for owner, tensor in proto_tensors(proto):
        _check_tensor(checker, owner, tensor)
    _check_graph_outputs(checker, proto.graph)
    free = _check_graph(checker, proto.graph, opsets)
    for name, user in free.items():
        message = f"{user} uses the value {_short(name)}, which nothing produces"
        checker.refuse(message)
    for function in proto.functions:
        _check_function(checker, function, opsets)


def _check_versions(checker: _Checker, proto: onnx.ModelProto) -> dict[str, int]:
    if not _MIN_IR_VERSION <= proto.ir_version <= onnx.IR_VERSION:
        message = f"IR version {proto.ir_version} is not between {_MIN_IR_VERSION} and "
        checker.refuse(f"{message}{onnx.IR_VERSION}", "update the onnx package or " + _AGAIN)
    opsets = _opsets(checker, proto.opset_import)
    if not opsets:
        message = "the model declares no opset: what its operators mean is undefined"
        checker.refuse(message)
    version = opsets.get("")
    newest = onnx.defs.onnx_opset_version()
    if version is not None and not MIN_OPSET <= version <= newest:
        message = f"opset {version} is not supported: {MIN_OPSET} to {newest} are"
        checker.refuse(message, f"export with an opset between {MIN_OPSET} and {newest}")
    return opsets


def _opsets(checker: _Checker, imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in imports:
        domain = standard_domain(entry.domain)
        if opsets.setdefault(domain, entry.version) != entry.version:
            message = f"domain {_short(domain or 'ai.onnx')} is declared at two opset versions"
            checker.refuse(message)
    return opsets


def _check_tensor(checker: _Checker, owner: str, tensor: onnx.TensorProto) -> None:
    dims = tensor.dims
    known = tensor.data_type != 0 and tensor.data_type in set(ir.DataType)
    if not known:
        checker.refuse(f"{owner} has the unknown element type {tensor.data_type}")
    if any(dim < 0 for dim in dims):
        checker.refuse(f"{owner} has a negative dimension: {list(dims[:8])}")
    if len(dims) > _MAX_RANK or math.prod(dim for dim in dims if dim) > _MAX_ELEMENTS:
        checker.refuse(f"{owner} has an absurd shape: {list(dims[:8])}, rank {len(dims)}")
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        _check_data_size(checker, owner, tensor)


def _check_data_size(checker: _Checker, owner: str, tensor: onnx.TensorProto) -> None:
    elements = math.prod(tensor.dims)
    dtype = ir.DataType(tensor.data_type)
    if dtype == ir.DataType.STRING:
        expected, found, unit = elements, len(tensor.string_data), "strings"
    elif tensor.HasField("raw_data"):
        expected, found, unit = -(-elements * dtype.bitwidth // 8), len(tensor.raw_data), "bytes"
    else:
        per_element = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
        expected = -(-elements * min(dtype.bitwidth, 8) // 8) * per_element
        found, unit = sum(len(getattr(tensor, name)) for name in _TYPED_FIELDS), "numbers"
    if expected != found:
        message = f"{owner}: shape {list(tensor.dims[:8])} of {dtype} needs {expected} {unit}"
        checker.refuse(f"{message}, the file has {found}")


def _check_graph_outputs(checker: _Checker, graph: onnx.GraphProto) -> None:
    if not graph.output:
        checker.refuse("the graph has no outputs")
    if graph.sparse_initializer:
        checker.refuse("sparse initializers are not supported", "make them dense")


def _check_function(
    checker: _Checker, function: onnx.FunctionProto, model_opsets: dict[str, int]
) -> None:
    opsets = _opsets(checker, function.opset_import)
    version, own = model_opsets.get(""), opsets.get("")
    if own is not None and not MIN_OPSET <= own <= onnx.defs.onnx_opset_version():
        message = f"function {_short(function.name)} is of opset {own}; the model of {version}"
        checker.refuse(message)
    free = _check_body(checker, function.node, function.input, function.output, opsets)
    for name, user in free.items():
        message = f"{user} of function {_short(function.name)} uses {_short(name)}"
        checker.refuse(f"{message}, which nothing produces")


def _check_graph(
    checker: _Checker, graph: onnx.GraphProto, opsets: dict[str, int]
) -> dict[str, str]:
    """Check a graph and return the names it takes from outside, each with the node that does."""
    inputs = [value.name for value in graph.input]
    initializers = [tensor.name for tensor in graph.initializer]
    for name in _repeated(initializers):
        checker.refuse(f"two initializers are called {_short(name)}")
    if "" in initializers:
        checker.refuse("an initializer has no name")
    for value in (*graph.input, *graph.output, *graph.value_info):
        _check_value(checker, value)
    # Up to IR version 3 an initializer is an input too; later it may be one, as its default.
    given = inputs + [name for name in initializers if name not in set(inputs)]
    outputs = [value.name for value in graph.output]
    return _check_body(checker, graph.node, given, outputs, opsets)


def _check_value(checker: _Checker, value: onnx.ValueInfoProto) -> None:
    if not value.type.HasField("tensor_type"):
        return
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_value < -1:
            message = f"the value {_short(value.name)} has the dimension {dim.dim_value}"
            checker.refuse(message)
        if dim.dim_value == -1:
            dim.ClearField("value")


def _check_body(
    checker: _Checker,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opsets: dict[str, int],
) -> dict[str, str]:
    _check_text(checker, (*inputs, *outputs))
    for name in _repeated(inputs):
        checker.refuse(f"two graph inputs are called {_short(name)}")
    producers = _producers(checker, nodes, inputs)
    free: dict[str, str] = {}
    sorted_so_far = True
    uses: list[list[int]] = []
    for index, node in enumerate(nodes):
        _check_node(checker, node, opsets)
        sources = []
        for name in _used_names(checker, node, opsets):
            source = producers.get(name)
            if source is None:
                free.setdefault(name, _title(node))
            elif source >= 0:
                sources.append(source)
                sorted_so_far = sorted_so_far and source < index
        uses.append(sources)
    if not sorted_so_far:
        _check_acyclic(checker, nodes, uses)
    for name in outputs:
        if name not in producers:
            free.setdefault(name, "the list of graph outputs")
    return free


def _producers(
    checker: _Checker, nodes: Sequence[onnx.NodeProto], inputs: Sequence[str]
) -> dict[str, int]:
    """Return the position of the node that makes each value; -1 for what is given."""
    producers: dict[str, int] = dict.fromkeys(inputs, -1)
    for index, node in enumerate(nodes):
        for name in node.output:
            if name and producers.setdefault(name, index) != index:
                first = producers[name]
                other = "a graph input or initializer" if first < 0 else _title(nodes[first])
                message = f"the value {_short(name)} is made by {_title(node)} and by {other}"
                checker.refuse(message)
        for name in _repeated([name for name in node.output if name]):
            checker.refuse(f"{_title(node)} makes the value {_short(name)} twice")
    return producers


def _used_names(checker: _Checker, node: onnx.NodeProto, opsets: dict[str, int]) -> Iterator[str]:
    for name in node.input:
        if name:
            yield name
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from _check_graph(checker, attribute.g, opsets)
        for graph in attribute.graphs:
            yield from _check_graph(checker, graph, opsets)


def _check_acyclic(
    checker: _Checker, nodes: Sequence[onnx.NodeProto], uses: list[list[int]]
) -> None:
    """Strip nodes whose sources are all stripped; what is left over lies on or behind a cycle."""
    missing = [len(sources) for sources in uses]
    users: list[list[int]] = [[] for _ in nodes]
    for index, sources in enumerate(uses):
        for source in sources:
            users[source].append(index)
    ready = [index for index, count in enumerate(missing) if not count]
    while ready:
        for user in users[ready.pop()]:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    for index, count in enumerate(missing):
        if count:
            message = f"the graph has a cycle: {_title(nodes[index])} waits for its own result"
            checker.refuse(message)


def _check_text(checker: _Checker, texts: Iterable[str]) -> None:
    """Refuse text that is not UTF-8, which the protobuf library hands out as bytes."""
    for text in texts:
        if isinstance(text, bytes):
            checker.refuse(f"a name is not UTF-8 text: {text[:80]!r}")


def _check_node(checker: _Checker, node: onnx.NodeProto, opsets: dict[str, int]) -> None:
    _check_text(checker, (node.name, node.op_type, node.domain, node.doc_string))
    _check_text(checker, (*node.input, *node.output, *(a.name for a in node.attribute)))
    if not node.op_type:
        checker.refuse(f"{_title(node)} has no operator type")
    domain = standard_domain(node.domain)
    if domain not in opsets:
        message = f"{_title(node)} is of the domain {_short(domain or 'ai.onnx')}"
        hint = "declare the domain in opset_import, or export the model again"
        checker.refuse(f"{message}, which the model does not declare", hint)
    if domain not in _STANDARD or (node.domain, node.op_type) in checker.functions:
        return
    key = (domain, node.op_type, opsets[domain])
    if key not in checker.signatures:
        checker.signatures[key] = _signature(*key)
    signature = checker.signatures[key]
    if signature is None:
        message = f"{_title(node)}: there is no such operator in opset {opsets[domain]}"
        hint = "a custom operator needs a domain of its own; or the opset number is wrong"
        checker.refuse(f"{message} of {domain or 'ai.onnx'}", hint)
    _check_signature(checker, node, signature)


def _signature(domain: str, op_type: str, version: int) -> _Signature | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    if schema.deprecated:
        return None
    attributes = schema.attributes
    return _Signature(
        {name: _attribute_type(attribute.type) for name, attribute in attributes.items()},
        frozenset(name for name, attribute in attributes.items() if attribute.required),
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
    )


def _attribute_type(kind: onnx.defs.OpSchema.AttrType) -> int:
    number: int = onnx.AttributeProto.AttributeType.Value(str(kind).rpartition(".")[2])
    return number


def _check_signature(checker: _Checker, node: onnx.NodeProto, signature: _Signature) -> None:
    names = [attribute.name for attribute in node.attribute]
    for name in _repeated(names):
        checker.refuse(f"{_title(node)} has the attribute {_short(name)} twice")
    for attribute in node.attribute:
        expected = signature.attributes.get(attribute.name)
        if expected is None:
            checker.refuse(f"{_title(node)} has an unknown attribute {_short(attribute.name)}")
        if attribute.type != expected:
            kind = onnx.AttributeProto.AttributeType.Name(expected)
            message = f"{_title(node)}: its attribute {_short(attribute.name)} must be of type"
            checker.refuse(f"{message} {kind}")
    for name in sorted(signature.required.difference(names)):
        checker.refuse(f"{_title(node)} lacks its attribute {name!r}")
    for what, found, (low, high) in (
        ("inputs", len(node.input), signature.inputs),
        ("outputs", len(node.output), signature.outputs),
    ):
        if not low <= found <= high:
            message = f"{_title(node)} has {found} {what}, and needs {low}"
            checker.refuse(message if low == high else f"{message} to {high}")


def _repeated(names: Sequence[str]) -> Iterator[str]:
    if len(set(names)) != len(names):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                yield name
            seen.add(name)


def _title(node: onnx.NodeProto) -> str:
    name = node.name or (node.output[0] if node.output else "")
    return f"node {_short(name)} ({node.op_type[:40] or 'no operator'})"


def _short(name: str) -> str:
    return repr(name) if len(name) <= 80 else f"{name[:80]!r}..."
