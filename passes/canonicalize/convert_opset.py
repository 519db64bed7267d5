"""Brings a model to the opset that the later passes and the target are written for."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qcompiler.ir import opset
from qcompiler.ir.dataflow import ONNX_DOMAINS
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage


@dataclass(frozen=True, slots=True)
class ConvertOpsetOptions:
    """Options of `convert-opset`.

    Attributes:
        version: The standard opset to reach; a model that is beyond it stays as it is.
    """

    version: int = 21


class ConvertOpset(Pass):
    """Raise every node to a version of the standard opset.

    Before: opset 11, y = Squeeze<axes=[0]>(x)
    After:  opset 21, y = Squeeze(x, axes)
    Refuses: nothing; a model with a node that has no equivalent is turned down with a ModelError
        that names the node.
    """

    name: ClassVar = "convert-opset"
    consumes: ClassVar = Stage.IMPORTED
    produces: ClassVar = Stage.IMPORTED
    numerics: ClassVar = Numerics.EXACT

    def __init__(self, options: ConvertOpsetOptions | None = None) -> None:
        self._version = (options or ConvertOpsetOptions()).version

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Convert the model.

        Raises:
            ModelError: A node cannot be converted.
        """
        before = _version_of(model)
        if not opset.convert_opset(model, self._version):
            return PassResult()
        detail = f"from opset {before} to {_version_of(model)}"
        return PassResult((Rewrite(self.name, model.graph.name or "", detail),))


def _version_of(model: ir.Model) -> int | None:
    versions = (model.opset_imports.get(domain) for domain in ONNX_DOMAINS)
    return next((version for version in versions if version is not None), None)
