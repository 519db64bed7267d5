"""What looks at the models between the passes of a compilation, and what it saw."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration.error_growth import GrowthOptions
from qcompiler.calibration.numerics import NumericsRecord, VerifyNumerics
from qcompiler.calibration.samples import load_feeds, synthetic_feeds
from qcompiler.options import CompileOptions, Verification
from qcompiler.passes.equalize.equalize_channels import EqualizeChannels
from qcompiler.plan import Plan
from qcompiler.report.network import Network, measure_network
from qcompiler.rewriting.base import Pass, PassContext
from qcompiler.rewriting.float_models import KeepFloatModels
from qcompiler.rewriting.graph_changes import CountGraphChanges, GraphChange
from qcompiler.rewriting.manager import PassHook
from qcompiler.rewriting.snapshots import DumpModels, KeepReproducer


@dataclass(frozen=True, slots=True)
class Watching:
    """The hooks of a compilation.

    Attributes:
        keeping: Those that write models to disk.
        numerics: With `--verify numerics`.
        floats: With samples, on which the result is compared with what it was made from.
        changes: What happened to the graph.
    """

    keeping: tuple[PassHook, ...]
    numerics: VerifyNumerics | None
    floats: KeepFloatModels | None
    changes: CountGraphChanges = field(default_factory=CountGraphChanges)

    def hooks(self) -> Sequence[PassHook]:
        """Return all of them, in the order in which they are called."""
        mine: tuple[PassHook | None, ...] = (self.numerics, self.floats, self.changes)
        return [*self.keeping, *(hook for hook in mine if hook is not None)]

    def missed(self, passes: Sequence[Pass]) -> None:
        """Hear which passes ran before a compilation that was stopped went on."""
        if self.floats is not None:
            self.floats.missed(passes)

    def network(self, plan: Plan, model: ir.Model, context: PassContext) -> Network:
        """Look at where error comes in along the graph, if there are samples to run it on.

        Raises:
            TargetError: ONNX Runtime cannot run one of the models.
        """
        if plan.data is None or plan.calibration is None or self.floats is None:
            return Network()
        options = GrowthOptions(
            plan.data.samples,
            plan.calibration.memory_budget,
            context.workers,
            plan.custom_op_libraries,
        )
        return measure_network(self.floats, model, options, context.progress)

    def comparisons(self) -> Sequence[NumericsRecord]:
        """Return how outputs changed, pass by pass; nothing where that was not looked at."""
        return self.numerics.records if self.numerics else ()

    def graph_changes(self) -> Sequence[GraphChange]:
        """Return what happened to the graph, of those passes that were seen: the last ones."""
        return self.changes.changes


def watch(model: ir.Model, plan: Plan, options: CompileOptions, folder: Path) -> Watching:
    """Return what looks at the models of a compilation.

    Args:
        model: The source model.
        plan: What is compiled.
        options: The same as it was asked for.
        folder: Where a reproducer goes.
    """
    arguments = ["--target", plan.target.name, "--weight-range", plan.weight_range.value]
    arguments += ["--cast-io"] if plan.cast_io else []
    keeping: list[PassHook] = [KeepReproducer(folder, arguments, plan.recipe.to_toml())]
    if options.dump_ir is not None:
        keeping.append(DumpModels(options.dump_ir))
    floats = None if plan.data is None else KeepFloatModels(EqualizeChannels.name)
    return Watching(tuple(keeping), _numerics_hook(model, options), floats)


def _numerics_hook(model: ir.Model, options: CompileOptions) -> VerifyNumerics | None:
    if options.verify is not Verification.NUMERICS:
        return None
    feeds = (
        synthetic_feeds(model, seed=options.seed)
        if options.samples is None
        else load_feeds(options.samples, model)
    )
    return VerifyNumerics(feeds, options.custom_op_libraries)
