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


@dataclass(frozen=True, slots=True)
class Signature:
    """Names, types and shapes of a graph's inputs and outputs, as text."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, model: ir.Model) -> "Signature":
        """Read the signature of a model.

        Output shapes are left out: inference may sharpen them.
        """
        return cls(
            tuple(f"{v.name}: {v.type} {v.shape}" for v in model.graph.inputs),
            tuple(f"{v.name}: {v.type}" for v in model.graph.outputs),
        )


def verify(model: ir.Model, stage: Stage, signature: Signature, *, after: str) -> None:
    """Check structure, the stage's legality rules, and that the signature has not changed.

    Raises:
        InternalError: A rule is broken; the message names up to five places. These are defects
            of a pass, since bad input is refused when it is loaded.
    """
    _raise_for(structural_faults(model), after)
    _raise_for(violations(model, stage), after)
    found = Signature.of(model)
    if found != signature:
        message = f"changed the model's signature from {signature} to {found}"
        raise InternalError(message, where=f"pass {after}")


def check_standard(model: ir.Model, *, after: str) -> None:
    """Run ONNX's own checker and shape inference; weights are not read.

    Raises:
        InternalError: The checker refuses the model.
    """
    try:
        CheckerPass(full_check=False)(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        text = str(error).strip().splitlines()[0]
        message = f"ONNX's checker refuses the model: {text}"
        raise InternalError(message, where=f"pass {after}") from error
    infer_shapes(model)


def _raise_for(faults: Iterable[Violation], after: str) -> None:
    found = list(islice(faults, _SHOWN + 1))
    if not found:
        return
    listed = "; ".join(f"[{fault.rule}] {fault.where}: {fault.fault}" for fault in found[:_SHOWN])
    more = "; and more" if len(found) > _SHOWN else ""
    message = f"left an illegal model: {listed}{more}"
    raise InternalError(message, where=f"pass {after}")
