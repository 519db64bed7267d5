"""Learns codes and step sizes over windows of blocks (CBQ)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.errors import InternalError
from qcompiler.quant.reconstruction import BlockReconstruction, Start
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage
from qcompiler.team import Team

if TYPE_CHECKING:
    from qcompiler.reconstruction.checkpoint import Checkpoint
    from qcompiler.reconstruction.starting_point import StartingPoint

RULE = "reconstruct-blocks"


@dataclass(frozen=True, slots=True)
class ReconstructBlocksOptions:
    """Options of `reconstruct-blocks`.

    Attributes:
        samples: The calls to run the model on. One of eight is not learned from; these judge.
        insert: Passes that make a Q/DQ graph of a planned one, `insert-qdq` the last of them.
        how: What is learned, and how.
        device: Where to compute, as PyTorch calls it: "cpu", "cuda", "cuda:1".
        memory_budget: Bytes the process may take; a quarter is for values between blocks, and
            what does not fit goes to disk.
        padding_mask: Name of an input `[batch, tokens]` that is 0 where a token does not count;
            a model without it has no padding.
        checkpoint: A folder that finished windows are kept in, and taken from where they are there;
            None keeps none. Where several processes run the pass they share one, which the
            leading process writes.
    """

    samples: Samples
    insert: tuple[Pass, ...]
    how: BlockReconstruction = field(default_factory=BlockReconstruction)
    device: str = "cpu"
    memory_budget: int = 2 << 30
    padding_mask: str | None = "attention_mask"
    checkpoint: Path | None = None


class ReconstructBlocks(Pass):
    """Quantize weights, then learn codes and step sizes from what blocks compute in float.

    Before: y = MatMul(x, w)
    After:  y = MatMul(x, DequantizeLinear(codes, scale))     the nodes of insert-qdq, other codes
    Refuses: tables that are only looked up; recurrent ops; ops in bodies of others; weights that
        ops of several blocks read; windows that came out no better on held-out calls. They keep
        the codes they had at the start.

    A window of blocks reads what the quantized blocks before it give, and learns to give what the
    float model has at its end (CBQ, Ding et al. 2023, arXiv 2312.07950). What is learned starts
    from the codes of GPTQ or the nearest ones. Step sizes of activations are learned too, where the
    graph has any that one block alone reads. One window's weights are on the device at once.

    Raises (from `run`):
        ModelError: What an op multiplies holds NaN or infinity on a sample, or no gradient passes
            through a window.
        UsageError: PyTorch is not installed (from the constructor), the device cannot be used, one
            call takes more memory than there is, the checkpoint is of something else, or the disk
            is full.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    options: ReconstructBlocksOptions

    def __init__(self, options: ReconstructBlocksOptions) -> None:
        # Not having PyTorch must show before any work is done, and not where passes are listed.
        import_module("qcompiler.reconstruction")
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Insert, round, learn window by window, and check that only initializers changed."""
        from qcompiler.reconstruction.block_stream import open_device
        from qcompiler.reconstruction.reconstruction import reconstruct_model
        from qcompiler.reconstruction.starting_point import edges, quantize_to_start
        from qcompiler.reconstruction.window_making import ReconstructionRun

        options = self.options
        team = context.team
        device = team.device(options.device)
        open_device(device)
        start = quantize_to_start(model, options.insert, context)
        before = edges(model)
        checkpoint = self._checkpoint(start, team)
        records = self._start(start, context, checkpoint)
        run = ReconstructionRun(
            options.how, device, options.memory_budget // 4, options.padding_mask, team
        )
        records += reconstruct_model(
            start, options.samples, run, context.store, context.progress, checkpoint
        )
        if edges(model) != before:
            message = "reconstruction changed more than the contents of initializers"
            raise InternalError(message, where=self.label)
        rewrites = [record for record in records if isinstance(record, Rewrite)]
        skips = [record for record in records if isinstance(record, Skip)]
        return PassResult((*start.rewrites, *rewrites), (*start.skips, *skips))

    def _checkpoint(self, start: "StartingPoint", team: Team) -> "Checkpoint | None":
        from qcompiler.reconstruction.checkpoint import facts_of_run, shared_checkpoint

        options = self.options
        if options.checkpoint is None:
            if team.size > 1:
                message = "several processes need a folder to share, and have none"
                raise InternalError(message, where=self.label)
            return None
        facts = facts_of_run(start, options.samples, [options.how, options.padding_mask])
        return shared_checkpoint(options.checkpoint, facts, team)

    def _start(
        self, start: "StartingPoint", context: PassContext, checkpoint: "Checkpoint | None"
    ) -> list[Rewrite | Skip]:
        """Give weights the codes that learning starts from; the leading process finds them."""
        from qcompiler.reconstruction.writing import contents, put_contents

        records: list[Rewrite | Skip] = []
        if self.options.how.start is Start.NEAREST:
            return records

        def take_kept() -> None:
            assert checkpoint is not None
            for index, weight in enumerate(start.weights):
                put_contents(weight, checkpoint.start(index), context.store)

        def find() -> None:
            if checkpoint is not None and checkpoint.has_start(len(start.weights)):
                take_kept()
                return
            records.extend(self._rounded(start, context))
            if checkpoint is not None:
                for index, weight in enumerate(start.weights):
                    checkpoint.put_start(index, contents(weight))

        context.team.lead(find)
        if context.team.size > 1:
            context.team.agree(lambda: take_kept() if context.team.rank else None)
        return records

    def _rounded(self, start: "StartingPoint", context: PassContext) -> Iterator[Rewrite | Skip]:
        from qcompiler.reconstruction.rounding import RoundingRun, round_model
        from qcompiler.reconstruction.rounding_records import records_of

        options = self.options
        run = RoundingRun(
            device=context.team.device(options.device),
            memory=options.memory_budget // 4,
            padding_mask=options.padding_mask,
        )
        for outcome in round_model(start, options.samples, run, context.store, context.progress):
            yield from records_of(outcome)
