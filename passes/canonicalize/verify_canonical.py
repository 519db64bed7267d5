"""Says that a model has canonical form, or what it still needs."""

from typing import ClassVar

import onnx_ir as ir

from qcompiler.errors import UsageError
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult
from qcompiler.rewriting.legality import violations
from qcompiler.rewriting.stages import Stage


class VerifyCanonical(Pass):
    """Check, read-only, that a model is canonical, and let it pass to that stage.

    Before: a model after the canonicalizing passes.
    After:  the same model, at stage CANONICAL.
    Refuses: nothing; a model that breaks a rule of the stage is turned down with a UsageError
        that names the first place, since passes were left out or run out of order.
    """

    name: ClassVar[str] = "verify-canonical"
    consumes: ClassVar[Stage] = Stage.IMPORTED
    produces: ClassVar[Stage] = Stage.CANONICAL
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Check every rule of the stage.

        Raises:
            UsageError: A rule is broken.
        """
        found = next(violations(model, Stage.CANONICAL), None)
        if found is not None:
            message = f"the model is not canonical: {found.fault} [{found.rule}]"
            hint = "run the canonicalizing passes first; `qcompile --list passes` shows them"
            raise UsageError(message, where=found.where, hint=hint)
        return PassResult()
