"""What a report says about the types that a graph computes in, read off the graph."""

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from qcompiler.execution.narrow_floats import has_bfloat16
from qcompiler.ir.dataflow import all_nodes, is_op
from qcompiler.ir.provenance import COMPUTE_TYPE, CREATED_BY, TYPE_REASON

_CASTING: Final = ("cast-types", "widen-scales")
"""Passes that add Casts."""


@dataclass(frozen=True, slots=True)
class TypeCounts:
    """How many ops compute in which type.

    Attributes:
        compute_type: The 16-bit type that the model was cast to, None where it was not.
        narrow: Ops that read or make values of that type; without the Casts that were added, also
            those of a scale's type, which become a part of the kernel behind them.
        wide: Ops that stay in float32.
        casts: Casts that were added.
    """

    compute_type: str | None = None
    narrow: int | None = None
    wide: int | None = None
    casts: int | None = None


def type_counts(model: ir.Model) -> TypeCounts:
    """Count the ops of a compiled model by type; nothing where it was not cast."""
    compute = model.metadata_props.get(COMPUTE_TYPE)
    if compute is None:
        return TypeCounts()
    nodes = [node for node in all_nodes(model) if not _is_added_cast(node, *_CASTING)]
    casts = sum(1 for node in all_nodes(model) if _is_added_cast(node, "cast-types"))
    wide = sum(1 for node in nodes if TYPE_REASON in node.metadata_props)
    narrow = sum(1 for node in nodes if compute_type_of(node, compute) == compute)
    return TypeCounts(compute, narrow, wide, casts)


def type_warnings(model: ir.Model, *, runs_here: bool) -> tuple[str, ...]:
    """Say what to know of a model that was cast.

    Args:
        model: The compiled model.
        runs_here: Whether ONNX Runtime is to run it.
    """
    counts = type_counts(model)
    if counts.compute_type is None:
        return ()
    if not counts.narrow:
        why = "its reasons are with each op" if counts.wide else "the model has no float32 for it"
        return (f"no op computes in {counts.compute_type}: {why}",)
    if runs_here and has_bfloat16(model):
        return (
            "ONNX Runtime has no bfloat16 kernels on a CPU, so what it would run was not looked "
            "at; outputs were judged in float32 with every value rounded to bfloat16",
        )
    return ()


def compute_type_of(node: ir.Node, compute: str | None) -> str | None:
    """Return the float type a node computes in; None where the model was not cast.

    Args:
        node: A node of the compiled model.
        compute: The 16-bit type that the model was cast to.
    """
    if compute is None:
        return None
    if COMPUTE_TYPE in node.metadata_props:
        return node.metadata_props[COMPUTE_TYPE]
    narrow = ir.DataType[compute.upper()]
    values = (*node.inputs, *node.outputs)
    return compute if any(v is not None and v.dtype == narrow for v in values) else None


def _is_added_cast(node: ir.Node, *makers: str) -> bool:
    return is_op(node, "Cast") and node.metadata_props.get(CREATED_BY) in makers
