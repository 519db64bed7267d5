"""Running one pass in a test, and the property every pass has: a second run changes nothing."""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.weights import WeightStore
from qcompiler.rewriting.base import Pass, PassContext, PassResult, Skip
from qcompiler.rewriting.structure import structural_faults
from tests.support.graphs import serialized


def run_pass(
    rewrite: Pass, model: ir.Model, folder: Path, *, spill_bytes: int = 1 << 20
) -> PassResult:
    """Run a pass over a model in place, and check that the graph still hangs together.

    Args:
        rewrite: The pass.
        model: The model.
        folder: Where tensors the pass makes go; the model refers to files in it.
        spill_bytes: Tensors of at least this size go to disk.
    """
    context = PassContext(WeightStore(folder, spill_bytes))
    result = rewrite.run(model, context)
    assert list(structural_faults(model)) == []
    return result


def assert_idempotent(rewrite: Pass, model: ir.Model, folder: Path) -> None:
    """Run a pass twice and fail if the second run does anything."""
    run_pass(rewrite, model, folder)
    once = serialized(model)
    again = run_pass(rewrite, model, folder)
    assert again.rewrites == ()
    assert serialized(model) == once


def reasons(result: PassResult) -> Sequence[str]:
    """Return why a pass refused what it refused, in order."""
    return [skip.reason for skip in result.skips]


def only_skip(result: PassResult) -> Skip:
    """Return the single refusal of a run that changed nothing."""
    assert result.rewrites == ()
    assert len(result.skips) == 1, result.skips
    return result.skips[0]
