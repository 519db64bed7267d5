"""Keeping the float models that a quantized one is compared with."""

import onnx_ir as ir

from qcompiler.rewriting.base import Numerics, Pass, PassResult


class KeepFloatModels:
    """Keeps the model before a pass of some name, and before the first pass that loses anything.

    Copies share their weights with the model, so they live no longer than its `WeightStore`.
    Functions of a user's own do not count as lossy: what they make is what is to be compiled.

    Args:
        before: Name of the pass.

    Attributes:
        last: The model before the first lossy pass; None until then.
    """

    def __init__(self, before: str) -> None:
        self._name = before
        self._first: ir.Model | None = None
        self.last: ir.Model | None = None

    @property
    def first(self) -> ir.Model | None:
        """The model before the named pass; that before the first lossy one where it did not run."""
        return self._first or self.last

    def before_pass(self, model: ir.Model, rewrite: Pass) -> None:
        """Copy the model where it is one of the two."""
        if rewrite.name == self._name and self._first is None:
            self._first = model.clone()
        loses = rewrite.numerics is Numerics.LOSSY and not rewrite.written_by_user
        if loses and self.last is None:
            self.last = model.clone()

    def after_pass(self, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        """Do nothing."""

    def on_failure(self, rewrite: Pass, error: BaseException) -> str | None:
        """Do nothing."""
        return None
