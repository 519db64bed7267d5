"""Finds what a task depends on in the weights, and keeps more bits of it."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.task_calls import Task
from qcompiler.errors import ModelError, UsageError
from qcompiler.ir.provenance import ISLANDS
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.assign.island_subjects import RULE, Subjects, find_subjects
from qcompiler.quant.islands import IslandKind, IslandRequest
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.scheme import QScheme
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage
from qcompiler.targets.capability import Target

if TYPE_CHECKING:
    from qcompiler.passes.assign.island_plans import Planner
    from qcompiler.reconstruction.island_scores import Floats, Scoring
    from qcompiler.reconstruction.starting_point import StartingPoint


@dataclass(frozen=True, slots=True)
class AssignIslandsOptions:
    """Options of `assign-islands`.

    Attributes:
        request: Which islands, and what they may cost.
        task: What the model is to be good at.
        samples: The calls that codes are chosen on.
        insert: Passes that make a Q/DQ graph of a planned one, `insert-qdq` the last of them.
        target: Where the model is to run.
        range_method: How ranges are chosen where schemes are tried.
        device: Where to compute, as PyTorch calls it.
        memory_budget: Bytes the process may take; a quarter is for values between blocks.
        seed: Of the random measure.
        signed: Whether gradients of samples may cancel: only to show that they must not.
        gradients: Folder that gradients are kept in and reused from; None keeps none.
    """

    request: IslandRequest
    task: Task
    samples: Samples
    insert: tuple[Pass, ...]
    target: Target
    range_method: RangeMethod = RangeMethod.WEIGHTED_MSE
    device: str = "cpu"
    memory_budget: int = 2 << 30
    seed: int = 0
    signed: bool = False
    gradients: Path | None = None


class AssignIslands(Pass):
    """Keep more bits of the weights that a task depends on most.

    Before: y = MatMul(x, w)
    After:  y = MatMul(x, w with some rows zero) + MatMul(Gather(x, rows), w[rows] at 16 bits)
    Refuses: weights that several ops read, lookup tables, ops in bodies of others, ops on
        quantized data; for parts of weights also what `ir.side_paths` cannot split.

    What a weight is worth by default is `|W| |dL/dW| |Q(W) - W|` of the task's loss L, Q(W) being
    what GPTQ makes of it on a clone with the same scheme and samples (TaCQ, arXiv 2504.07389). One
    budget holds for the model, whatever weight an island lies in. Islands are single weights, input
    channels, input channels by the block (both parts quantized, the second at more bits), or whole
    weights, whose schemes change and whose graph does not. Those of the published method are
    single weights; the others are ours. What follows rounds the rest: the masked form of GPTQ
    (`round-weights`) finds the values of the islands as well.

    Raises (from `run`):
        ModelError: The loss has no gradient, or no weight can have islands.
        UsageError: The budget is too small, PyTorch is missing (from the constructor), or the disk
            is full.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    options: AssignIslandsOptions

    def __init__(self, options: AssignIslandsOptions) -> None:
        import_module("qcompiler.reconstruction")
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Score a clone, choose, and rewrite the model."""
        if ISLANDS in model.metadata_props:
            return PassResult()
        options = self.options
        stored = options.request.budget.nbytes is not None
        kind = options.request.kind
        subjects, skips = find_subjects(model, kind, options.target, stored=stored)
        if not subjects.sites:
            message = "no weight of the model can have islands"
            reason = skips[0].reason if skips else "none is planned to be quantized"
            raise ModelError(message, where=self.label, hint=f"for example: {reason}")
        self._check_budget(subjects)
        with _scratch(context) as inner:
            rewrites = self._choose_and_write(model, subjects, inner, context.store)
        return PassResult(tuple(rewrites), tuple(skips))

    def _check_budget(self, subjects: Subjects) -> None:
        """Refuse a budget before minutes of work rather than behind them."""
        request = self.options.request
        if request.kind is IslandKind.NODE and request.budget.fraction is not None:
            message = "whole weights have no fraction of elements in islands"
            raise UsageError(message, where="--island-fraction", hint="give --average-bits")
        request.budget.room(subjects.base_bits, subjects.elements, subjects.island_elements)

    def _choose_and_write(
        self, model: ir.Model, subjects: Subjects, inner: PassContext, store: WeightStore
    ) -> list[Rewrite]:
        from qcompiler.passes.assign.island_writing import IslandWriter

        options = self.options
        with self._planner(model, subjects, inner) as planner:
            writer = IslandWriter(model, subjects, options.request, planner.scored, store)
            return writer.write(planner.plan(), planner.concentration(), options.task.origin)

    def damages(
        self,
        model: ir.Model,
        schemes: Mapping[str, Sequence[QScheme | None]],
        context: PassContext,
    ) -> dict[str, list[float]]:
        """Predict what whole weights would lose with other schemes; the model stays as it is.

        Args:
            model: The model, with schemes that its weights are scored at.
            schemes: By name of the weight, what it could get.
            context: What the pass may use.

        Returns:
            For every weight that can have another scheme, the damage of each, to first order.
        """
        subjects, _ = find_subjects(model, IslandKind.NODE, self.options.target, stored=False)
        if not subjects.sites:
            return {}
        with (
            _scratch(context) as inner,
            self._planner(model, subjects, inner) as planner,
        ):
            return {
                name: planner.damages(at, schemes[name])
                for at, name in enumerate(subjects.names)
                if name in schemes
            }

    @contextmanager
    def _planner(
        self, model: ir.Model, subjects: Subjects, inner: PassContext
    ) -> Iterator["Planner"]:
        """Score a clone, and yield what chooses by its scores."""
        from qcompiler.passes.assign.island_plans import Planner
        from qcompiler.reconstruction.island_scores import ScoredWeights
        from qcompiler.reconstruction.tensor_files import TensorFiles

        options, folder = self.options, inner.store.directory
        scoring = self._scoring()
        with TensorFiles(folder) as gradients, TensorFiles(folder) as scores:
            start, of_channels = self._quantized(model, inner, rounded=scoring.needs_rounding)
            known = {weight.name: weight for weight in start.weights}
            weights = {name: known[name] for name in subjects.names}
            scored = ScoredWeights(scoring, gradients, scores)
            scored.compute(start, list(weights.values()), of_channels, inner.progress)
            yield Planner(
                options.request, subjects, options.target, scored, weights, options.range_method
            )

    def _scoring(self) -> "Scoring":
        from qcompiler.reconstruction.gradients import GradientRun
        from qcompiler.reconstruction.island_scores import Scoring
        from qcompiler.reconstruction.kept_gradients import KeptGradients

        options = self.options
        run = GradientRun(options.device, options.memory_budget // 4, options.signed)
        kept = KeptGradients(options.gradients)
        return Scoring(options.request.saliency, options.task, run, options.seed, kept)

    def _quantized(
        self, model: ir.Model, context: PassContext, *, rounded: bool
    ) -> tuple["StartingPoint", dict[str, "Floats"]]:
        """Return a clone as it would be without islands, and what errors of channels cost there."""
        from qcompiler.reconstruction.rounding import RoundingRun, round_model
        from qcompiler.reconstruction.starting_point import quantize_to_start

        options = self.options
        start = quantize_to_start(model.clone(), options.insert, context)
        if not rounded:
            return start, {}
        run = RoundingRun(device=options.device, memory=options.memory_budget // 4)
        found = round_model(start, options.samples, run, context.store, context.progress)
        known = {each.weight.name: each.importance for each in found}
        return start, {name: each for name, each in known.items() if each is not None}


@contextmanager
def _scratch(context: PassContext) -> Iterator[PassContext]:
    """Yield a context for what the clone needs, in a folder that goes afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix=".qcompile-islands-", dir=context.store.directory) as at,
        WeightStore(Path(at)) as store,
    ):
        yield replace(context, store=store)
