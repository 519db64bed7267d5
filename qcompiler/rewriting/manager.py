"""Runs passes in order, verifies after each, and keeps a record of what they did."""

import time
from collections.abc import Sequence
from typing import Protocol

import onnx_ir as ir

from qcompiler.errors import InternalError, ParityError, QCompilerError, UsageError
from qcompiler.ir.provenance import STAGE
from qcompiler.rewriting.base import Pass, PassContext, PassRecord, PassResult
from qcompiler.rewriting.stages import Stage
from qcompiler.rewriting.verifier import Signature, check_standard, verify
from qcompiler.rewriting.work_folder import WorkFolder


class PassHook(Protocol):
    """Something that wants to see every intermediate model.

    A hook that raises in `after_pass` fails the pass, so other hooks may still get `on_failure`
    for a pass they have seen the end of.
    """

    def before_pass(self, model: ir.Model, rewrite: Pass) -> None:
        """Look at the model a pass is about to change."""
        ...

    def after_pass(self, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        """Look at the verified model a pass left; may raise to stop the run."""
        ...

    def on_failure(self, rewrite: Pass, error: BaseException) -> str | None:
        """Keep what helps to repeat a failure; returns a hint for the message, or None."""
        ...


def stage_of(model: ir.Model) -> Stage:
    """Return the stage a model has reached: IMPORTED unless this compiler recorded another.

    Raises:
        UsageError: The record is not a stage this version knows.
    """
    text = model.metadata_props.get(STAGE, Stage.IMPORTED)
    try:
        return Stage(text)
    except ValueError as error:
        message = f"the model says it is at stage {text!r}, which this version does not know"
        raise UsageError(message, hint=f"stages: {', '.join(Stage)}") from error


class PassManager:
    """Runs passes over one model.

    Args:
        context: What the passes may use.
        hooks: Called around every pass, in this order.
        work: Where intermediate models are kept, if anywhere.
    """

    def __init__(
        self,
        context: PassContext,
        hooks: Sequence[PassHook] = (),
        work: WorkFolder | None = None,
    ) -> None:
        self._context = context
        self._hooks = tuple(hooks)
        self._work = work

    def run(
        self, model: ir.Model, passes: Sequence[Pass], done: Sequence[PassRecord] = ()
    ) -> list[PassRecord]:
        """Run `passes` over `model` in place.

        Args:
            model: The model, as the passes of `done` left it.
            passes: All of them.
            done: Records of the first of them, which have run already.

        Returns:
            The records of all.

        Raises:
            UsageError: A pass needs a stage the model has not reached, or a user's pass failed.
            ParityError: A hook found that a pass changes what it must not.
            InternalError: A pass broke the model, or failed in a way it did not declare.
            QCompilerError: Whatever a pass refuses the model with.
        """
        signature = Signature.of(model)
        records = [*done]
        with self._context.progress.task("passes", len(passes)) as advance:
            advance(len(done))
            for rewrite in passes[len(done) :]:
                if rewrite.retypes_signature:
                    kept = Signature.of(model, any_float=True)
                    records.append(self._run_one(model, rewrite, kept))
                    signature = Signature.of(model)
                else:
                    records.append(self._run_one(model, rewrite, signature))
                if self._work is not None:
                    self._work.keep(model, records)
                advance(1)
        return records

    def _run_one(self, model: ir.Model, rewrite: Pass, signature: Signature) -> PassRecord:
        reached = stage_of(model)
        if reached.rank < rewrite.consumes.rank:
            message = f"needs a model at stage {rewrite.consumes}, and this one is at {reached}"
            raise UsageError(
                message,
                where=rewrite.label,
                hint="run the passes that lead there first; `qcompile --list passes` shows them",
            )
        for hook in self._hooks:
            hook.before_pass(model, rewrite)
        started = time.perf_counter()
        try:
            result = rewrite.run(model, self._context)
            seconds = time.perf_counter() - started
            stage = max(reached, rewrite.produces, key=lambda member: member.rank)
            model.metadata_props[STAGE] = stage
            verify(model, stage, signature, after=rewrite.label)
            if (stage is not reached and stage is not Stage.ASSIGNED) or rewrite.written_by_user:
                check_standard(model, after=rewrite.label)
            for hook in self._hooks:
                hook.after_pass(model, rewrite, result)
        except Exception as error:
            raise self._explained(rewrite, error) from error
        return PassRecord(
            rewrite.name, stage, rewrite.numerics, seconds, result.rewrites, result.skips
        )

    def _explained(self, rewrite: Pass, error: Exception) -> QCompilerError:
        """Turn a failure into one of ours; defects come with a reproducer."""
        if isinstance(error, QCompilerError) and not isinstance(error, InternalError | ParityError):
            return error
        if rewrite.written_by_user:
            return _users_fault(rewrite, error)
        hints = [hook.on_failure(rewrite, error) for hook in self._hooks]
        hint = "; ".join(text for text in hints if text)
        if isinstance(error, ParityError):
            kept = "; ".join(text for text in (error.hint, hint) if text)
            return ParityError(error.message, where=error.where, hint=kept or None)
        hint = hint or "please report this"
        if isinstance(error, InternalError):
            return InternalError(error.message, where=error.where, hint=hint)
        message = f"failed with {type(error).__name__}: {error}"
        return InternalError(message, where=rewrite.label, hint=hint)


def _users_fault(rewrite: Pass, error: Exception) -> QCompilerError:
    """Return the error for a user's pass; the command that was run is its reproducer."""
    if isinstance(error, ParityError):
        return error
    hint = "--dump-ir keeps the model before it"
    if isinstance(error, InternalError):
        return UsageError(error.message, where=error.where, hint=hint)
    message = f"made a model that cannot be checked: {type(error).__name__}: {error}"
    return UsageError(message, where=rewrite.label, hint=hint)
