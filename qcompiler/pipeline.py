"""What a compilation is made of: the passes that its options lead to, in order."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from qcompiler.calibration.held_out import spread
from qcompiler.errors import UsageError
from qcompiler.options import CalibrationOptions, Reconstruction
from qcompiler.passes.assign.assign_fallbacks import AssignFallbacks, FallbackOptions
from qcompiler.passes.assign.assign_islands import AssignIslands, AssignIslandsOptions
from qcompiler.passes.assign.assign_schemes import AssignOptions, AssignSchemes
from qcompiler.passes.assign.drop_slow_regions import DropSlowRegions, DropSlowRegionsOptions
from qcompiler.passes.assign.place_quantizers import PlaceOptions, PlaceQuantizers
from qcompiler.passes.canonicalize.assign_names import AssignNames
from qcompiler.passes.canonicalize.convert_opset import ConvertOpset, ConvertOpsetOptions
from qcompiler.passes.canonicalize.deduplicate import Deduplicate
from qcompiler.passes.canonicalize.eliminate_dead import EliminateDead
from qcompiler.passes.canonicalize.eliminate_identity import EliminateIdentity
from qcompiler.passes.canonicalize.fold_batch_norm import FoldBatchNorm
from qcompiler.passes.canonicalize.fold_constants import FoldConstants
from qcompiler.passes.canonicalize.inline_functions import InlineFunctions
from qcompiler.passes.canonicalize.lift_constants import LiftConstants
from qcompiler.passes.canonicalize.verify_canonical import VerifyCanonical
from qcompiler.passes.equalize.equalize_channels import EqualizeChannels, EqualizeOptions
from qcompiler.passes.equalize.group_scales import ScaleOptions
from qcompiler.passes.equalize.output_check import CheckOptions
from qcompiler.passes.equalize.suppress_outliers import SuppressOptions, SuppressOutliers
from qcompiler.passes.lower.cast_types import CastTypes, CastTypesOptions
from qcompiler.passes.lower.center_activations import CenterActivations
from qcompiler.passes.lower.decode_at_load import DecodeAtLoad
from qcompiler.passes.lower.decompose_gemm import DecomposeGemm
from qcompiler.passes.lower.decompose_quantized_ops import DecomposeQuantizedOps
from qcompiler.passes.lower.isolate_float_ops import IsolateFloatOps
from qcompiler.passes.lower.lower_dynamic_quantization import LowerDynamicQuantization
from qcompiler.passes.lower.lower_embeddings import LowerEmbeddings
from qcompiler.passes.lower.lower_matmul_nbits import LowerMatMulNBits
from qcompiler.passes.lower.quantize_biases import QuantizeBiases
from qcompiler.passes.lower.recode_weights import RecodeWeights
from qcompiler.passes.lower.remove_dynamic_quantization import RemoveDynamicQuantization
from qcompiler.passes.lower.verify_target import VerifyTarget, VerifyTargetOptions
from qcompiler.passes.lower.widen_scales import WidenScales
from qcompiler.passes.quantize.calibrate import Calibrate, CalibrateOptions
from qcompiler.passes.quantize.correct_bias import CorrectBias, CorrectBiasOptions
from qcompiler.passes.quantize.expand_residuals import ExpandResiduals
from qcompiler.passes.quantize.insert_activation_qdq import InsertActivationQdq
from qcompiler.passes.quantize.insert_qdq import InsertQdq, InsertQdqOptions
from qcompiler.passes.quantize.split_outlier_channels import SplitOutlierChannels
from qcompiler.passes.reconstruct.reconstruct_blocks import (
    ReconstructBlocks,
    ReconstructBlocksOptions,
)
from qcompiler.passes.reconstruct.round_weights import RoundWeights, RoundWeightsOptions
from qcompiler.plan import Plan, choosing_samples
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.equalization import EqualizationMethod
from qcompiler.quant.ranges import RangeMethod
from qcompiler.rewriting.base import Pass


def _calibrate_options(plan: Plan) -> CalibrateOptions:
    options, data = plan.calibration, plan.data
    if options is None or data is None:
        message = "calibrate needs samples"
        raise UsageError(message, hint="give --calibration DATA and a scheme such as w8a8")
    samples = choosing_samples(plan, data.samples)
    outliers, two_terms_below = _apart(plan, options)
    return CalibrateOptions(
        samples,
        data.model_fingerprint,
        options.observer,
        (SplitOutlierChannels(), ExpandResiduals(), InsertActivationQdq()),
        options.percentile,
        outliers,
        two_terms_below,
        options.memory_budget,
        options.statistics,
        plan.custom_op_libraries,
    )


def _apart(plan: Plan, options: CalibrationOptions) -> tuple[int, float]:
    """Return what may be computed beside the integer products: outlier channels, second terms.

    Nothing where arithmetic is emulated: it would cost nothing there, and the accuracy be that of
    more bits than were asked for.
    """
    if plan.target.emulated:
        return 0, 0.0
    return options.outlier_channels, options.two_terms_below


def _equalize_channels(plan: Plan) -> EqualizeChannels:
    chosen, options, data = plan.equalization, plan.calibration, plan.data
    if chosen.method is None or options is None or data is None:
        message = "equalize-channels needs samples and a method"
        raise UsageError(message, hint="give --calibration DATA, and --equalize auto")
    samples = choosing_samples(plan, data.samples)
    outliers, two_terms_below = _apart(plan, options)
    return EqualizeChannels(
        EqualizeOptions(
            samples,
            ScaleOptions(
                chosen.method,
                chosen.alpha,
                chosen.percentile,
                outliers,
                two_terms_below,
            ),
            chosen.insert_mul,
            options.memory_budget,
            plan.custom_op_libraries,
            _check_of_outputs(plan),
        )
    )


def _check_of_outputs(plan: Plan) -> CheckOptions | None:
    """Return how `equalize-channels` compares outputs, if it does.

    Not where codes are chosen by what they compute: that takes far longer than all else.
    """
    chosen, options, data = plan.equalization, plan.calibration, plan.data
    wanted = chosen.check and chosen.method is EqualizationMethod.AUTO
    if not wanted or plan.reconstruct is not Reconstruction.NONE or not options or not data:
        return None
    samples = choosing_samples(plan, data.samples)
    few = spread(samples, _CHECKING_CALLS)
    passes: list[Pass] = []
    if plan.static:
        # Statistics that are kept are those of the model as it will be, on all calls.
        ranges = replace(_calibrate_options(plan), samples=few, statistics=None)
        passes.append(Calibrate(ranges))
    if plan.correct_bias:
        passes.append(CorrectBias(replace(_correct_bias(plan).options, samples=few)))
    passes += _made([*_inserting(plan), *_DYNAMIC], plan)
    return CheckOptions(tuple(passes), samples, options.memory_budget, plan.custom_op_libraries)


def _suppress_outliers(plan: Plan) -> SuppressOutliers:
    options, data = plan.calibration, plan.data
    if options is None or data is None:
        message = "suppress-outliers needs samples"
        raise UsageError(message, hint="give --calibration DATA, and --equalize cfp")
    samples = choosing_samples(plan, data.samples)
    return SuppressOutliers(
        SuppressOptions(samples, plan.weight_range, options.memory_budget, plan.custom_op_libraries)
    )


def _assign_fallbacks(plan: Plan) -> AssignFallbacks:
    if plan.bound is None or plan.calibration is None or plan.data is None:
        message = "there is no bound that must hold"
        hint = "give --calibration DATA, a scheme such as w8a8, and --min-output-sqnr or --metric"
        raise UsageError(message, where=AssignFallbacks.name, hint=hint)
    return AssignFallbacks(
        FallbackOptions(
            plan.bound,
            plan.data.samples,
            plan.target,
            PlaceQuantizers(PlaceOptions(plan.target.placement)),
            tuple(quantizing_passes(plan)),
            tuple(_made([*_casting(plan), *_lowering(plan)], plan)),
            plan.calibration.memory_budget,
            plan.custom_op_libraries,
        )
    )


def _correct_bias(plan: Plan) -> CorrectBias:
    options, data = plan.calibration, plan.data
    if options is None or data is None:
        message = "correct-bias needs samples"
        raise UsageError(message, hint="give --calibration DATA")
    samples = choosing_samples(plan, data.samples)
    return CorrectBias(
        CorrectBiasOptions(
            samples,
            tuple(_made([*_inserting(plan), *_DYNAMIC], plan)),
            plan.target,
            options.memory_budget,
            plan.custom_op_libraries,
        )
    )


def _assign_islands(plan: Plan) -> AssignIslands:
    request, options, data = plan.recipe.islands, plan.calibration, plan.data
    if request is None or options is None or data is None or data.task is None:
        message = "assign-islands needs a budget and samples"
        hint = "give --islands tacq --average-bits 3.1, and --task FILE or --calibration DATA"
        raise UsageError(message, where=AssignIslands.name, hint=hint)
    samples = choosing_samples(plan, data.samples)
    return AssignIslands(
        AssignIslandsOptions(
            request,
            data.task,
            samples,
            tuple(_made(_inserting(plan), plan)),
            plan.target,
            plan.weight_range,
            plan.device,
            options.memory_budget,
            gradients=plan.gradients,
        )
    )


def _inserting(plan: Plan) -> list[type[Pass]]:
    return [kind for kind in _INSERTING if plan.static or kind not in _STATIC]


def _round_weights(plan: Plan) -> RoundWeights:
    options, data = plan.calibration, plan.data
    if options is None or data is None:
        message = "round-weights needs samples"
        raise UsageError(message, hint="give --calibration DATA")
    samples = choosing_samples(plan, data.samples)
    inserting = tuple(_made(_inserting(plan), plan))
    return RoundWeights(RoundWeightsOptions(samples, inserting, plan.device, options.memory_budget))


def _reconstruct_blocks(plan: Plan) -> ReconstructBlocks:
    options, data = plan.calibration, plan.data
    if options is None or data is None:
        message = "reconstruct-blocks needs samples"
        raise UsageError(message, hint="give --calibration DATA")
    samples = choosing_samples(plan, data.samples)
    return ReconstructBlocks(
        ReconstructBlocksOptions(
            samples,
            tuple(_made(_inserting(plan), plan)),
            plan.blocks,
            plan.device,
            options.memory_budget,
            checkpoint=plan.windows,
        )
    )


def quantizing_passes(plan: Plan) -> list[Pass]:
    """Return what makes a Q/DQ graph of one whose quantizers are placed and calibrated."""
    return _made(_INSERTING, plan)


def _drop_slow_regions(plan: Plan) -> DropSlowRegions:
    if plan.data is None:
        message = "regions are measured on samples"
        raise UsageError(message, hint="give --calibration DATA and a scheme such as w8a8")
    # What the codes are does not change the speed, so the quickest way to find them will do.
    quick = replace(plan, weight_range=RangeMethod.MIN_MAX)
    remaining = [*_INSERTING, *_lowering(plan)]
    return DropSlowRegions(
        DropSlowRegionsOptions(
            plan.target,
            plan.data.samples,
            PlaceQuantizers(PlaceOptions(plan.target.placement)),
            tuple(_made(remaining, quick)),
            plan.measurements,
            plan.threads,
            plan.custom_op_libraries,
        )
    )


def _cast_types(plan: Plan) -> CastTypes:
    options, data = plan.calibration, plan.data
    return CastTypes(
        CastTypesOptions(
            plan.recipe.compute_type or ComputeType.FLOAT16,
            None if data is None else data.samples,
            keep_io=not plan.cast_io,
            float32=plan.recipe.float32,
            memory_budget=CastTypesOptions().memory_budget
            if options is None
            else options.memory_budget,
            custom_op_libraries=plan.custom_op_libraries,
        )
    )


_CHECKING_CALLS: Final = 8
"""Calls that ranges and corrections come from where equalizing is judged by the outputs."""

PassFactory = Callable[[Plan], Pass]

_CANONICALIZING: dict[type[Pass], PassFactory] = {
    InlineFunctions: lambda plan: InlineFunctions(),
    ConvertOpset: lambda plan: ConvertOpset(ConvertOpsetOptions(plan.opset, plan.target.opset_max)),
    LiftConstants: lambda plan: LiftConstants(),
    EliminateIdentity: lambda plan: EliminateIdentity(),
    FoldConstants: lambda plan: FoldConstants(),
    FoldBatchNorm: lambda plan: FoldBatchNorm(),
    Deduplicate: lambda plan: Deduplicate(),
    EliminateDead: lambda plan: EliminateDead(),
    AssignNames: lambda plan: AssignNames(),
    VerifyCanonical: lambda plan: VerifyCanonical(),
}

_QUANTIZING: dict[type[Pass], PassFactory] = {
    AssignSchemes: lambda plan: AssignSchemes(AssignOptions(plan.recipe, plan.target)),
    PlaceQuantizers: lambda plan: PlaceQuantizers(PlaceOptions(plan.target.placement)),
    EqualizeChannels: _equalize_channels,
    SuppressOutliers: _suppress_outliers,
    Calibrate: lambda plan: Calibrate(_calibrate_options(plan)),
    DropSlowRegions: _drop_slow_regions,
    AssignFallbacks: _assign_fallbacks,
    AssignIslands: _assign_islands,
    CorrectBias: _correct_bias,
    SplitOutlierChannels: lambda plan: SplitOutlierChannels(),
    ExpandResiduals: lambda plan: ExpandResiduals(),
    InsertActivationQdq: lambda plan: InsertActivationQdq(),
    InsertQdq: lambda plan: InsertQdq(InsertQdqOptions(plan.weight_range)),
    RoundWeights: _round_weights,
    ReconstructBlocks: _reconstruct_blocks,
}

_INSERTING: tuple[type[Pass], ...] = (
    SplitOutlierChannels,
    ExpandResiduals,
    InsertActivationQdq,
    InsertQdq,
)
"""Those that make a Q/DQ graph of a plan."""

_RECONSTRUCTING: dict[Reconstruction, type[Pass]] = {
    Reconstruction.GPTQ: RoundWeights,
    Reconstruction.CBQ: ReconstructBlocks,
}
"""Those that insert and choose codes."""

_DYNAMIC: tuple[type[Pass], ...] = (DecomposeGemm, LowerDynamicQuantization)
"""Those that put scales of the run into the graph, which a Q/DQ graph does not show."""

_STATIC: frozenset[type[Pass]] = frozenset(
    {PlaceQuantizers, Calibrate, SplitOutlierChannels, ExpandResiduals, InsertActivationQdq}
)
"""Those that only calibrated activations need."""

_CASTING: dict[type[Pass], PassFactory] = {CastTypes: _cast_types}
"""Before lowering: kernels of a runtime's own have no public types that could be chosen."""

_LOWERING: dict[type[Pass], PassFactory] = {
    QuantizeBiases: lambda plan: QuantizeBiases(),
    DecomposeGemm: lambda plan: DecomposeGemm(),
    LowerMatMulNBits: lambda plan: LowerMatMulNBits(),
    LowerEmbeddings: lambda plan: LowerEmbeddings(),
    LowerDynamicQuantization: lambda plan: LowerDynamicQuantization(),
    DecodeAtLoad: lambda plan: DecodeAtLoad(),
    IsolateFloatOps: lambda plan: IsolateFloatOps(),
    WidenScales: lambda plan: WidenScales(),
}
"""Which of them run, and in which order, says the target."""

_TAKING_IN: dict[type[Pass], PassFactory] = {
    DecomposeQuantizedOps: lambda plan: DecomposeQuantizedOps(),
    RemoveDynamicQuantization: lambda plan: RemoveDynamicQuantization(),
    RecodeWeights: lambda plan: RecodeWeights(),
    CenterActivations: lambda plan: CenterActivations(),
}
"""The same, for what other tools quantized."""

_VERIFYING: dict[type[Pass], PassFactory] = {
    VerifyTarget: lambda plan: VerifyTarget(VerifyTargetOptions(plan.target)),
}

_FACTORIES = _CANONICALIZING | _QUANTIZING | _TAKING_IN | _CASTING | _LOWERING | _VERIFYING

PASSES: dict[str, type[Pass]] = {kind.name: kind for kind in _FACTORIES}
"""Every pass by name, in the order of the pipeline."""

_CLEANING_UP: tuple[type[Pass], ...] = (
    LiftConstants,
    FoldConstants,
    Deduplicate,
    EliminateDead,
    AssignNames,
    VerifyCanonical,
)
"""What brings a model that a user's pass changed back to canonical form."""


def pipeline(plan: Plan) -> list[Pass]:
    """Return the passes of a compilation, in order."""
    passes = _made(_CANONICALIZING, plan)
    if plan.user_passes:
        passes += [*plan.user_passes, *_made(_CLEANING_UP, plan)]
    left_out: frozenset[type[Pass]] = frozenset() if plan.static else _STATIC
    if plan.calibration is None or plan.equalization.method is None:
        left_out |= {EqualizeChannels}
    if plan.calibration is None or plan.equalization.method is not EqualizationMethod.CFP:
        left_out |= {SuppressOutliers}
    # Rounding inserts for itself: it compares with the float model it began with.
    reconstructing = plan.reconstruct is not Reconstruction.NONE
    left_out |= frozenset(_INSERTING) if reconstructing else frozenset()
    left_out |= {kind for method, kind in _RECONSTRUCTING.items() if method is not plan.reconstruct}
    # What is rounded for its output has next to no mean error left.
    if plan.calibration is None or reconstructing or not plan.correct_bias:
        left_out |= {CorrectBias}
    if not plan.never_slower:
        left_out |= {DropSlowRegions}
    if plan.bound is None:
        left_out |= {AssignFallbacks}
    if plan.recipe.islands is None:
        left_out |= {AssignIslands}
    if not plan.quantizing:
        left_out |= {EqualizeChannels, SuppressOutliers, CorrectBias}
    quantizing = [kind for kind in _QUANTIZING if kind not in left_out]
    remaining = [*_intake(plan), *_casting(plan), *_lowering(plan), *_VERIFYING]
    return passes + _made([*quantizing, *remaining], plan)


def _casting(plan: Plan) -> list[type[Pass]]:
    return [] if plan.recipe.compute_type is None else list(_CASTING)


def _lowering(plan: Plan) -> list[type[Pass]]:
    return [PASSES[name] for name in plan.target.lowering]


def _intake(plan: Plan) -> list[type[Pass]]:
    return [PASSES[name] for name in plan.target.intake]


def _made(kinds: Iterable[type[Pass]], plan: Plan) -> list[Pass]:
    return [_FACTORIES[kind](plan) for kind in kinds]


def pass_named(name: str, plan: Plan) -> Pass:
    """Return one pass, ready to run.

    Raises:
        UsageError: No pass has this name; the message lists those that do.
    """
    if name not in PASSES:
        message = f"no pass is called {name!r}"
        raise UsageError(message, hint=f"passes: {', '.join(PASSES)}")
    return _FACTORIES[PASSES[name]](plan)
