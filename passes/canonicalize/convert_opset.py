"""Brings a model to the opset that the later passes and the target are written for."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompiler.errors import TargetError
from qcompiler.ir import opset
from qcompiler.ir.dataflow import standard_opset
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage


@dataclass(frozen=True, slots=True)
class ConvertOpsetOptions:
    """Options of `convert-opset`.

    Attributes:
        version: The standard opset to reach; a model that is beyond it stays as it is.
        highest: The highest one that a model may be at, None for any.
    """

    version: int = 21
    highest: int | None = None


class ConvertOpset(Pass):
    """Raise every node to a version of the standard opset.

    Before: opset 11, y = Squeeze<axes=[0]>(x)
    After:  opset 21, y = Squeeze(x, axes)
    Refuses: nothing; a model with a node that has no equivalent is turned down with a ModelError
        that names the node, and one beyond the highest opset with a TargetError.
    """

    name: ClassVar = "convert-opset"
    consumes: ClassVar = Stage.IMPORTED
    produces: ClassVar = Stage.IMPORTED
    numerics: ClassVar = Numerics.EXACT
    options: ConvertOpsetOptions

    def __init__(self, options: ConvertOpsetOptions | None = None) -> None:
        self.options = options or ConvertOpsetOptions()

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Convert the model.

        Raises:
            ModelError: A node cannot be converted.
            TargetError: The model, or what is wanted of it, is beyond the target's highest opset.
        """
        before = standard_opset(model)
        wanted, highest = self.options.version, self.options.highest
        reached = max(before or wanted, wanted)
        if highest is not None and reached > highest:
            message = f"the target loads models up to opset {highest}, not {reached}"
            hint = f"export the model with an opset up to {highest}, or choose other schemes"
            raise TargetError(message, hint=hint, reason="opset")
        if not opset.convert_opset(model, wanted):
            return PassResult()
        detail = f"from opset {before} to {standard_opset(model)}"
        return PassResult((Rewrite(self.name, model.graph.name or "", detail),))
