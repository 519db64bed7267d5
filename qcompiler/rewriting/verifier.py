"""Checks a model after a pass, and says which rule broke and where."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import CheckerPass

from qcompiler.errors import InternalError
from qcompiler.ir.shapes import infer_shapes
from qcompiler.rewriting.legality import Violation, violations
from qcompiler.rewriting.stages import Stage
from qcompiler.rewriting.structure import structural_faults

_SHOWN = 5
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NO_RANK = "Field 'shape' of 'type' is required"


@dataclass(frozen=True, slots=True)
class Signature:
    """What callers of a graph rely on, as text.

    Attributes:
        inputs: Name, type and shape of every input.
        outputs: Name and type of every output; no shapes, as inference may sharpen them.
        any_float: Whether all float types count as one.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    any_float: bool = False

    def holds_for(self, other: "Signature") -> bool:
        """Whether another signature is the same, but for types that were not known here."""
        if self.inputs != other.inputs or len(self.outputs) != len(other.outputs):
            return False
        return all(
            before in (after, f"{after.partition(': ')[0]}: None")
            for before, after in zip(self.outputs, other.outputs, strict=True)
        )

    @classmethod
    def of(cls, model: ir.Model, *, any_float: bool = False) -> "Signature":
        """Read the signature of a model."""
        return cls(
            tuple(f"{v.name}: {_type(v, any_float)} {v.shape}" for v in model.graph.inputs),
            tuple(f"{v.name}: {_type(v, any_float)}" for v in model.graph.outputs),
            any_float,
        )


def _type(value: ir.Value, any_float: bool) -> str:
    if any_float and isinstance(value.type, ir.TensorType) and value.type.dtype in _FLOATS:
        return "a float type"
    return str(value.type)


def verify(model: ir.Model, stage: Stage, signature: Signature, *, after: str) -> None:
    """Check structure, the stage's legality rules, and that the signature has not changed.

    Args:
        model: The model as a pass left it.
        stage: The stage it should be at.
        signature: What it had before the first pass, or what this pass must keep of it.
        after: What messages call the pass.

    Raises:
        InternalError: A rule is broken; the message names up to five places. These are defects
            of a pass, since bad input is refused when it is loaded.
    """
    _raise_for(structural_faults(model), after)
    _raise_for(violations(model, stage), after)
    found = Signature.of(model, any_float=signature.any_float)
    if not signature.holds_for(found):
        message = f"changed the model's signature from {signature} to {found}"
        raise InternalError(message, where=after)


def check_standard(model: ir.Model, *, after: str) -> None:
    """Run shape inference and ONNX's own checker; weights are not read.

    A graph output of unknown rank, which the checker refuses and runtimes take, is accepted.

    Raises:
        InternalError: The checker refuses the model.
    """
    infer_shapes(model)
    try:
        CheckerPass(full_check=False)(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        text = str(error).strip().splitlines()[0]
        if _NO_RANK in text and any(value.shape is None for value in model.graph.outputs):
            return
        message = f"ONNX's checker refuses the model: {text}"
        raise InternalError(message, where=after) from error


def _raise_for(faults: Iterable[Violation], after: str) -> None:
    found = list(islice(faults, _SHOWN + 1))
    if not found:
        return
    listed = "; ".join(f"[{fault.rule}] {fault.where}: {fault.fault}" for fault in found[:_SHOWN])
    more = "; and more" if len(found) > _SHOWN else ""
    message = f"left an illegal model: {listed}{more}"
    raise InternalError(message, where=after)
