"""Raising the standard opset of a model by converting its nodes, never by relabelling them.

The C++ converter of the onnx package is not used: at 1.23 it drops the metadata of every node,
leaves functions as they are, gives the Resize and Upsample of opset 10 and before the coordinates
of opset 11, and leaves GroupNormalization its scales per group. The converter of onnxscript
starts at opset 18. `tests/ir/test_opset.py` compares every operator that changed, in ONNX
Runtime, before and after.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import onnx.defs
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcompiler.errors import InternalError, ModelError
from qcompiler.ir.dataflow import ONNX_DOMAINS, node_name, standard_opset
from qcompiler.ir.editing import value_names
from qcompiler.ir.opset_adapters import ADAPTERS, NEEDS_SHAPES, CannotConvertError, Conversion

REVIEWED_OPSET: Final = 28
"""The newest opset whose changes were read for differences of meaning."""
_LOWEST_TARGET: Final = 18
"""Adapters write what every opset from here on understands."""


def convert_opset(model: ir.Model, version: int) -> bool:
    """Raise the ai.onnx opset of a model to at least `version`, in place.

    Bodies of If, Loop and Scan are converted, and functions too, except where a function's
    parameter stands for an attribute that became an input: inline functions first. Nodes of
    other domains stay as they are, and so does everything of an opset of `version` or later.
    Names and metadata of nodes stay; what is put beside a node gets its metadata.

    Args:
        model: The model. After a ModelError it is half converted and of no use.
        version: The opset wanted, 18 or later.

    Returns:
        Whether anything changed.

    Raises:
        ModelError: A node cannot be said in the newer opset; node, operator and reason are given.
        InternalError: `version` is below 18, or newer than the changes that were reviewed.
    """
    if not _LOWEST_TARGET <= version <= REVIEWED_OPSET:
        message = f"opset {version} is not one to convert to: {_LOWEST_TARGET} to {REVIEWED_OPSET}"
        raise InternalError(message)
    graph = model.graph
    bodies: tuple[ir.Graph | ir.Function, ...] = (graph, *model.functions.values())
    old = [body for body in bodies if 0 < standard_opset(body) < version]
    if any(_wants_shapes(node) for body in old for node in body.all_nodes()):
        ShapeInferencePass()(model)
    taken = value_names(model)
    for body in old:
        start = standard_opset(body)
        for node in tuple(body.all_nodes()):
            if node.domain in ONNX_DOMAINS:
                _convert_node(node, start, version, taken)
        body.opset_imports.pop("ai.onnx", None)
        body.opset_imports[""] = version
    if not standard_opset(graph):
        graph.opset_imports[""] = version
        return True
    return bool(old)


def _wants_shapes(node: ir.Node) -> bool:
    if node.op_type not in NEEDS_SHAPES or not node.inputs:
        return False
    data = node.inputs[0]
    return data is not None and (data.shape is None or data.dtype is None)


def _convert_node(node: ir.Node, start: int, version: int, taken: set[str]) -> None:
    """Take a node over every version that changed its operator."""
    title, op_type = node_name(node), node.op_type
    for reached in range(start + 1, version + 1):
        change = change_of(node.op_type, reached)
        if change is None:
            continue
        try:
            adapter = ADAPTERS.get((node.op_type, reached))
            if adapter is not None:
                adapter(Conversion(node, taken))
            else:
                _check_unchanged(node, change)
        except CannotConvertError as error:
            message = f"{op_type} cannot be converted from opset {start} to {version}: "
            message += f"opset {reached} changed it, and {error}"
            hint = f"export the model with opset {reached} or later"
            where = f"node {title!r}"
            raise ModelError(message, where=where, hint=hint, reason="opset") from error


@dataclass(frozen=True, slots=True)
class OperatorChange:
    """What one version of an operator took away from the version before it.

    Attributes:
        deprecated: The operator is gone.
        attributes: Attributes that are gone, or mean another type.
        defaults: Attributes that mean something else, or are asked for, when left out.
        inputs: Largest number of inputs, and of outputs.
        outputs: Largest number of outputs.
        types: By position of an input, element types (`tensor(int8)`) that are gone.
    """

    deprecated: bool
    attributes: frozenset[str]
    defaults: frozenset[str]
    inputs: int
    outputs: int
    types: tuple[frozenset[str], ...]


def _check_unchanged(node: ir.Node, change: OperatorChange) -> None:
    if change.deprecated:
        reason = "removed it"
        raise CannotConvertError(reason)
    for name in sorted(change.attributes):
        if name in node.attributes:
            reason = f"its attribute {name!r} is gone"
            raise CannotConvertError(reason)
    for name in sorted(change.defaults):
        if name not in node.attributes:
            reason = f"its attribute {name!r} has another default"
            raise CannotConvertError(reason)
    if len(node.inputs) > change.inputs or len(node.outputs) > change.outputs:
        reason = "it has more inputs or outputs than are allowed now"
        raise CannotConvertError(reason)
    for value, lost in zip(node.inputs, change.types, strict=False):
        dtype = value.dtype if value is not None else None
        if dtype is not None and f"tensor({dtype.name.lower()})" in lost:
            reason = f"it no longer takes {dtype.name.lower()}"
            raise CannotConvertError(reason)


def change_of(op_type: str, version: int) -> OperatorChange | None:
    """Return how this version changed an operator of ai.onnx; None when it did not."""
    return _changes().get((op_type, version))


@functools.cache
def _changes() -> dict[tuple[str, int], OperatorChange]:
    schemas: dict[str, list[onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain in ONNX_DOMAINS:
            schemas.setdefault(schema.name, []).append(schema)
    changes = {}
    for name, versions in schemas.items():
        versions.sort(key=lambda schema: schema.since_version)
        for before, after in itertools.pairwise(versions):
            changes[name, after.since_version] = _compare(before, after)
    return changes


def _compare(before: onnx.defs.OpSchema, after: onnx.defs.OpSchema) -> OperatorChange:
    old, new = before.attributes, after.attributes
    kept = [name for name in old if name in new]
    return OperatorChange(
        deprecated=after.deprecated,
        attributes=frozenset(
            name for name in old if name not in new or old[name].type != new[name].type
        ),
        defaults=frozenset(
            [name for name in kept if _loses_default(old[name], new[name])]
            + [name for name in new if name not in old and new[name].required]
        ),
        inputs=after.max_input,
        outputs=after.max_output,
        types=tuple(_lost_types(before, after)),
    )


def _loses_default(
    before: onnx.defs.OpSchema.Attribute, after: onnx.defs.OpSchema.Attribute
) -> bool:
    # An attribute that was asked for is there, so that its new default does not matter.
    return not before.required and (after.required or before.default_value != after.default_value)


def _lost_types(before: onnx.defs.OpSchema, after: onnx.defs.OpSchema) -> Iterator[frozenset[str]]:
    for old, new in zip(before.inputs, after.inputs, strict=False):
        yield frozenset(old.types) - frozenset(new.types)
