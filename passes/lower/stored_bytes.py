"""What the weights of lowered ops take in the file, written on the ops."""

from collections.abc import Iterator

import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes, constant_of, is_op
from qcompiler.ir.provenance import BYTES_AFTER, CREATED_BY, WEIGHT, annotate

_WEIGHT_INPUTS = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}
_CARRIED_BY = ("Cast", "Reshape", "Expand", "Transpose")
"""Ops between a constant and its reader; further inputs of theirs are shapes."""


def record_stored_bytes(model: ir.Model, created_by: str | None) -> None:
    """Write the bytes of codes, scales and zero points anew on the sites that a pass lowered.

    Sites of one weight carry the same number: the bytes of all that any of them reads, each
    tensor counted once, also at those that another pass lowers.

    Args:
        model: The model, changed in place.
        created_by: Name of the pass; None looks at all sites.
    """
    sites: dict[str, list[ir.Node]] = {}
    for node in all_nodes(model):
        if BYTES_AFTER in node.metadata_props:
            sites.setdefault(_weight_name(node), []).append(node)
    for group in sites.values():
        makers = {node.metadata_props.get(CREATED_BY) for node in group}
        if created_by is not None and created_by not in makers:
            continue
        stored = {value: size for node in group for value, size in _stored(node)}
        for node in group:
            annotate(node, weight_bytes_after=sum(stored.values()))


def _weight_name(node: ir.Node) -> str:
    return node.metadata_props.get(WEIGHT) or f"of {node.name}"


def _stored(node: ir.Node) -> Iterator[tuple[ir.Value, int]]:
    """Yield the constants that hold a site's weight, and their bytes."""
    for value in _weight_values(node):
        source = _carried(value)
        tensor = constant_of(source)
        if source is not None and tensor is not None:
            yield source, tensor.nbytes


def _weight_values(node: ir.Node) -> Iterator[ir.Value | None]:
    indices = _WEIGHT_INPUTS.get(node.op_type)
    if indices is not None:
        yield from (node.inputs[index] for index in indices if index < len(node.inputs))
        return
    for value in node.inputs:
        source = _carried(value)
        producer = source.producer() if source is not None else None
        if producer is None or not is_op(producer, "DequantizeLinear"):
            continue
        if constant_of(producer.inputs[0]) is not None:
            yield from producer.inputs


def _carried(value: ir.Value | None) -> ir.Value | None:
    """Follow a value back to what was only cast, reshaped, repeated or turned on its way."""
    while value is not None:
        producer = value.producer()
        if producer is None or not is_op(producer, *_CARRIED_BY):
            return value
        value = producer.inputs[0]
    return None
