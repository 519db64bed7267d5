"""Rounds weights so that the errors of their codes make up for each other (GPTQ)."""

from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.errors import InternalError
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "round-weights"


@dataclass(frozen=True, slots=True)
class RoundWeightsOptions:
    """Options of `round-weights`.

    Attributes:
        samples: The calls to run the model on.
        insert: Passes that make a Q/DQ graph of a planned one, `insert-qdq` the last of them.
        device: Where to compute, as PyTorch calls it: "cpu", "cuda", "cuda:1".
        memory_budget: Bytes the process may take; a quarter is for values between blocks, and
            what does not fit goes to disk.
        damping: Part of the mean of a Hessian's diagonal that is added to it.
        act_order: Whether columns are rounded in the order of falling second moments of the data.
        static_scales: Whether scales stay what `insert` made them. Otherwise, below 8 bits, each is
            chosen anew for the least output error. On SmolLM2 with 8 calls of 512 tokens that took
            the perplexity at w2a16:b64 from 693 to 156, and at w3a16:b128 from 89 to 41.
        true_sequential: Whether data comes from the rounded weights of the same block too.
        padding_mask: Name of an input `[batch, tokens]` that is 0 where a token does not count;
            a model without it has no padding.
    """

    samples: Samples
    insert: tuple[Pass, ...]
    device: str = "cpu"
    memory_budget: int = 2 << 30
    damping: float = 0.01
    act_order: bool = False
    static_scales: bool = False
    true_sequential: bool = True
    padding_mask: str | None = "attention_mask"


class RoundWeights(Pass):
    """Quantize weights, then choose codes by what they do to the output of their op.

    Before: y = MatMul(x, w)
    After:  y = MatMul(x, DequantizeLinear(codes, scale))     the nodes of insert-qdq, other codes
    Refuses: tables that are only looked up, for which the nearest codes are the best; recurrent
        ops and ConvTranspose; ops in bodies of others; what no sample reaches; channels for which
        no codes with a smaller error were found. They keep the codes that insert-qdq gave them.

    Columns of a weight are rounded one after the other, and those not yet rounded take up the
    error that each leaves in the op's output (GPTQ, Frantar et al. 2022, arXiv 2210.17323). The
    data is that of blocks before and of ops of the same block as they were rounded. A weight that
    several ops read is rounded for all of them when the first one's turn comes; where they lie in
    other blocks, their data is that of the codes before. Elements that islands hold
    (`assign-islands`) have no part in the choice of scales, but take up errors of others: they get
    other values, too. One block's weights are in memory at once. A model without float weights
    that are planned is left alone.

    Raises (from `run`):
        ModelError: What an op multiplies holds NaN or infinity on a sample.
        UsageError: PyTorch is not installed (from the constructor), the device cannot be used, or
            the disk is full.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    options: RoundWeightsOptions

    def __init__(self, options: RoundWeightsOptions) -> None:
        # Not having PyTorch must show before any work is done, and not where passes are listed.
        import_module("qcompiler.reconstruction")
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Insert, round block by block, and check that only initializers changed."""
        from qcompiler.reconstruction.block_stream import open_device
        from qcompiler.reconstruction.kept_islands import open_islands
        from qcompiler.reconstruction.rounding import RoundingRun, round_model
        from qcompiler.reconstruction.rounding_records import records_of
        from qcompiler.reconstruction.starting_point import edges, quantize_to_start
        from qcompiler.reconstruction.weight_rounding import RoundingSettings

        options = self.options
        open_device(options.device)
        start = quantize_to_start(model, options.insert, context)
        before = edges(model)
        settings = RoundingSettings(
            damping=options.damping,
            act_order=options.act_order,
            static_scales=options.static_scales,
        )
        run = RoundingRun(
            settings,
            options.device,
            options.memory_budget // 4,
            options.true_sequential,
            options.padding_mask,
        )
        islands = open_islands(start, context.store)
        outcomes = round_model(
            start,
            options.samples,
            run,
            context.store,
            context.progress,
            islands.masks,
            islands.keepers,
        )
        if edges(model) != before:
            message = "rounding changed more than the contents of initializers"
            raise InternalError(message, where=self.label)
        records = [record for outcome in outcomes for record in records_of(outcome)]
        rewrites = [record for record in records if isinstance(record, Rewrite)]
        skips = [record for record in records if isinstance(record, Skip)]
        return PassResult((*start.rewrites, *rewrites), (*start.skips, *skips))
