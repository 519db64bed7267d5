"""Keeping the float models that a quantized one is compared with."""

from collections.abc import Iterable

import onnx_ir as ir

from qcompiler.rewriting.base import Numerics, Pass, PassResult


class KeepFloatModels:
    """Keeps the model before a pass of some name, and before the first pass that loses anything.

    Copies share their weights with the model, so they live no longer than its `WeightStore`.
    Functions of a user's own do not count as lossy: what they make is what is to be compiled.

    Of passes that ran before a stopped compilation went on it knows only by `missed`; a model from
    before them is none of the two.

    Args:
        before: Name of the pass.

    Attributes:
        last: The model before the first lossy pass; None until then, and where that was missed.
    """

    def __init__(self, before: str) -> None:
        self._name = before
        self._first: ir.Model | None = None
        self._missed_first = False
        self._missed_last = False
        self.last: ir.Model | None = None

    @property
    def first(self) -> ir.Model | None:
        """The model before the named pass; that before the first lossy one where it did not run.

        None where it ran and was missed.
        """
        return None if self._missed_first else self._first or self.last

    def missed(self, passes: Iterable[Pass]) -> None:
        """Hear of passes that ran unseen, before the first that is seen."""
        for rewrite in passes:
            self._missed_first |= rewrite.name == self._name
            self._missed_last |= _loses(rewrite)

    def before_pass(self, model: ir.Model, rewrite: Pass) -> None:
        """Copy the model where it is one of the two."""
        if rewrite.name == self._name and self._first is None:
            self._first = model.clone()
        if _loses(rewrite) and self.last is None and not self._missed_last:
            self.last = model.clone()

    def after_pass(self, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        """Do nothing."""

    def on_failure(self, rewrite: Pass, error: BaseException) -> str | None:
        """Do nothing."""
        return None


def _loses(rewrite: Pass) -> bool:
    return rewrite.numerics is Numerics.LOSSY and not rewrite.written_by_user
