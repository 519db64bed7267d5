"""What a compilation is made of: the passes that its options lead to, in order."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.held_out import hold_out
from qcompiler.calibration.metric import OutputBound, output_bound
from qcompiler.calibration.samples import open_samples
from qcompiler.calibration.task_calls import Task, open_task
from qcompiler.errors import UsageError
from qcompiler.options import (
    CalibrationOptions,
    CompileOptions,
    EqualizationOptions,
    Reconstruction,
    TaskOptions,
    with_islands,
)
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
from qcompiler.passes.lower.decode_at_load import DecodeAtLoad
from qcompiler.passes.lower.decompose_gemm import DecomposeGemm
from qcompiler.passes.lower.isolate_float_ops import IsolateFloatOps
from qcompiler.passes.lower.lower_dynamic_quantization import LowerDynamicQuantization
from qcompiler.passes.lower.lower_embeddings import LowerEmbeddings
from qcompiler.passes.lower.lower_matmul_nbits import LowerMatMulNBits
from qcompiler.passes.lower.quantize_biases import QuantizeBiases
from qcompiler.passes.lower.verify_target import VerifyTarget, VerifyTargetOptions
from qcompiler.passes.quantize.calibrate import Calibrate, CalibrateOptions
from qcompiler.passes.quantize.correct_bias import CorrectBias, CorrectBiasOptions
from qcompiler.passes.quantize.insert_activation_qdq import InsertActivationQdq
from qcompiler.passes.quantize.insert_qdq import InsertQdq, InsertQdqOptions
from qcompiler.passes.quantize.split_outlier_channels import SplitOutlierChannels
from qcompiler.passes.reconstruct.round_weights import RoundWeights, RoundWeightsOptions
from qcompiler.quant.islands import IslandRequest
from qcompiler.quant.qtype import qtype_of
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.recipe import Recipe
from qcompiler.quant.scheme import Activations, QScheme, parse_scheme
from qcompiler.rewriting.base import Pass
from qcompiler.rewriting.legality import OPSET_OF
from qcompiler.rewriting.user_pass import RunUserPass
from qcompiler.targets.capability import Target
from qcompiler.targets.registry import find_target


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """What calibration needs and only a loaded model gives.

    Attributes:
        samples: The calls to run the model on.
        model_fingerprint: Returns the fingerprint of the source model.
        task: What the model is to be good at, None where nobody asks.
    """

    samples: Samples
    model_fingerprint: Callable[[], str]
    task: Task | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Options with every name looked up, so that what follows cannot fail on a typo.

    Attributes:
        target: The capability table.
        recipe: What each site is asked to get.
        weight_range: How weight ranges are chosen.
        opset: The ai.onnx opset the recipe's schemes need on this target.
        user_passes: The users' own passes.
        calibration: Where samples are and how ranges are found, None where no pass needs any.
        static: Whether a scheme has calibrated activations.
        equalization: How channels are equalized.
        correct_bias: Whether mean errors are taken out of biases.
        reconstruct: How codes of weights are chosen.
        islands: Which parts of weights keep more bits.
        task: What the model is to be good at; None is what it returns in float.
        device: Where PyTorch computes.
        custom_op_libraries: Shared libraries with custom operators for ONNX Runtime.
        data: The opened samples, and what gives the fingerprint of the source model; None until
            the model is known.
        bound: What must hold of the outputs, or None.
        never_slower: Whether latency is measured.
        measurements: The file that latencies are kept in, or None.
        threads: Threads of one operator when latency is measured, None for the runtime's own.
    """

    target: Target
    recipe: Recipe
    weight_range: RangeMethod
    opset: int
    user_passes: tuple[Pass, ...] = field(default=())
    calibration: CalibrationOptions | None = None
    static: bool = False
    equalization: EqualizationOptions = field(default_factory=EqualizationOptions)
    correct_bias: bool = False
    reconstruct: Reconstruction = Reconstruction.NONE
    islands: IslandRequest | None = None
    task: TaskOptions | None = None
    device: str = "cpu"
    custom_op_libraries: tuple[Path, ...] = ()
    data: CalibrationData | None = None
    bound: OutputBound | None = None
    never_slower: bool = False
    measurements: Path | None = None
    threads: int | None = None


def make_plan(options: CompileOptions) -> Plan:
    """Look up the target, read the recipe and import user passes.

    Raises:
        UsageError: An option names something that does not exist, or two contradict each other.
    """
    target = find_target(options.target)
    recipe = _recipe(options, target)
    schemes = [recipe.default, *(rule.scheme for rule in recipe.rules)]
    opset = max(target.opset_min, *(_opset_for(scheme) for scheme in schemes))
    static = any(scheme and scheme.activations is Activations.STATIC for scheme in schemes)
    equalization = options.equalization or EqualizationOptions(recipe.equalize)
    correct_bias = recipe.correct_bias if options.correct_bias is None else options.correct_bias
    islands = options.islands or recipe.islands
    if islands is not None:
        options = with_islands(options)
    sampled = (
        equalization.method is not None
        or correct_bias
        or options.reconstruct is not Reconstruction.NONE
    )
    calibration = _calibration(options, schemes, sampled=sampled)
    if options.reconstruct is not Reconstruction.NONE and calibration is None:
        message = f"--reconstruct {options.reconstruct} needs samples to see what ops compute"
        raise UsageError(message, hint="give --calibration DATA")
    if options.never_slower and not static:
        message = "there are no integer regions to measure without calibrated activations"
        raise UsageError(message, hint="give --calibration DATA, or leave --never-slower out")
    return Plan(
        target,
        recipe,
        options.weight_range or recipe.weight_range or RangeMethod.WEIGHTED_MSE,
        opset,
        tuple(RunUserPass(reference) for reference in options.user_passes),
        calibration,
        static,
        equalization,
        correct_bias,
        options.reconstruct,
        islands,
        options.task,
        options.device,
        options.custom_op_libraries,
        bound=_bound(options, static=static),
        never_slower=static and options.never_slower is not False,
        measurements=options.measurements,
        threads=options.threads,
    )


def _calibration(
    options: CompileOptions, schemes: Sequence[QScheme | None], *, sampled: bool
) -> CalibrationOptions | None:
    """Return how to calibrate, None where nothing needs it.

    Args:
        options: What is asked for.
        schemes: All that a site may get.
        sampled: Whether passes beside calibration use samples if there are any.
    """
    static = next((s for s in schemes if s and s.activations is Activations.STATIC), None)
    if static is None and (options.calibration is None or not sampled):
        return None
    if options.calibration is None:
        message = f"{static} needs samples to find the ranges of activations"
        raise UsageError(
            message,
            hint="give --calibration DATA, or use w8a8-dynamic, which scales them at each run",
        )
    if isinstance(options.calibration, str):
        return CalibrationOptions(options.calibration)
    return options.calibration


def with_data(plan: Plan, model: ir.Model, model_fingerprint: Callable[[], str]) -> Plan:
    """Open the samples of a plan, now that the model they must fit is known.

    Raises:
        UsageError: They cannot be read, or do not fit the model.
    """
    if plan.calibration is None:
        return plan
    options, task = plan.calibration, None
    samples = None if options.is_task else open_samples(options.source, model, options.samples)
    if plan.islands is not None:
        source = None if plan.task is None else plan.task.source
        task = open_task(source, model, (plan.task or options).samples, samples)
    if samples is None:
        assert task is not None
        samples = task.samples()
    return replace(plan, data=CalibrationData(samples, model_fingerprint, task))


def _bound(options: CompileOptions, *, static: bool) -> OutputBound | None:
    bound = output_bound(options.min_output_sqnr, options.metric, options.max_metric_drop)
    if bound is not None and not static:
        message = f"{bound.option} chooses which ops keep calibrated activations, and none has any"
        raise UsageError(message, hint="give --calibration DATA and a scheme such as w8a8")
    return bound


def _calibrate_options(plan: Plan) -> CalibrateOptions:
    options, data = plan.calibration, plan.data
    if options is None or data is None:
        message = "calibrate needs samples"
        raise UsageError(message, hint="give --calibration DATA and a scheme such as w8a8")
    # What judges the ranges must not have made them.
    samples = data.samples if plan.bound is None else hold_out(data.samples)[0]
    return CalibrateOptions(
        samples,
        data.model_fingerprint,
        options.observer,
        (SplitOutlierChannels(), InsertActivationQdq()),
        options.percentile,
        options.outlier_channels,
        options.memory_budget,
        options.statistics,
        plan.custom_op_libraries,
    )


def _equalize_channels(plan: Plan) -> EqualizeChannels:
    chosen, options, data = plan.equalization, plan.calibration, plan.data
    if chosen.method is None or options is None or data is None:
        message = "equalize-channels needs samples and a method"
        raise UsageError(message, hint="give --calibration DATA, and --equalize auto")
    samples = data.samples if plan.bound is None else hold_out(data.samples)[0]
    return EqualizeChannels(
        EqualizeOptions(
            samples,
            ScaleOptions(chosen.method, chosen.alpha, chosen.percentile, options.outlier_channels),
            chosen.insert_mul,
            options.memory_budget,
            plan.custom_op_libraries,
        )
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
            tuple(_made(_lowering(plan), plan)),
            plan.calibration.memory_budget,
            plan.custom_op_libraries,
        )
    )


def _correct_bias(plan: Plan) -> CorrectBias:
    options, data = plan.calibration, plan.data
    if options is None or data is None:
        message = "correct-bias needs samples"
        raise UsageError(message, hint="give --calibration DATA")
    samples = data.samples if plan.bound is None else hold_out(data.samples)[0]
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
    options, data = plan.calibration, plan.data
    if plan.islands is None or options is None or data is None or data.task is None:
        message = "assign-islands needs a budget and samples"
        hint = "give --islands tacq --average-bits 3.1, and --task FILE or --calibration DATA"
        raise UsageError(message, where=AssignIslands.name, hint=hint)
    return AssignIslands(
        AssignIslandsOptions(
            plan.islands,
            data.task,
            data.samples,
            tuple(_made(_inserting(plan), plan)),
            plan.target,
            plan.weight_range,
            plan.device,
            options.memory_budget,
        )
    )


def _inserting(plan: Plan) -> list[type[Pass]]:
    return [kind for kind in _INSERTING if plan.static or kind not in _STATIC]


def _round_weights(plan: Plan) -> RoundWeights:
    options, data = plan.calibration, plan.data
    if options is None or data is None:
        message = "round-weights needs samples"
        raise UsageError(message, hint="give --calibration DATA")
    samples = data.samples if plan.bound is None else hold_out(data.samples)[0]
    inserting = tuple(_made(_inserting(plan), plan))
    return RoundWeights(RoundWeightsOptions(samples, inserting, plan.device, options.memory_budget))


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


def _opset_for(scheme: QScheme | None) -> int:
    """Return the opset in which a scheme's codes can be written, blocked or not."""
    blocked = OPSET_OF["block_size"]
    if scheme is None:
        return blocked
    stored = qtype_of(scheme.weight_bits, signed=True).onnx_name
    return max(blocked, OPSET_OF.get(stored, blocked))


def _recipe(options: CompileOptions, target: Target) -> Recipe:
    if options.recipe is None:
        default = target.default_scheme
        if options.calibration is not None:
            default = target.calibrated_scheme
        scheme = parse_scheme(options.scheme or default)
        return Recipe.uniform(scheme, options.exclude)
    if options.scheme is not None:
        message = "a scheme and a recipe were given, and a recipe already says which scheme"
        raise UsageError(message, hint='put `default = "..."` into the recipe')
    recipe = options.recipe
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_toml(recipe)
    return recipe.excluding(options.exclude)


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
    Calibrate: lambda plan: Calibrate(_calibrate_options(plan)),
    DropSlowRegions: _drop_slow_regions,
    AssignFallbacks: _assign_fallbacks,
    AssignIslands: _assign_islands,
    CorrectBias: _correct_bias,
    SplitOutlierChannels: lambda plan: SplitOutlierChannels(),
    InsertActivationQdq: lambda plan: InsertActivationQdq(),
    InsertQdq: lambda plan: InsertQdq(InsertQdqOptions(plan.weight_range)),
    RoundWeights: _round_weights,
}

_INSERTING: tuple[type[Pass], ...] = (SplitOutlierChannels, InsertActivationQdq, InsertQdq)
"""Those that make a Q/DQ graph of a plan."""

_DYNAMIC: tuple[type[Pass], ...] = (DecomposeGemm, LowerDynamicQuantization)
"""Those that put scales of the run into the graph, which a Q/DQ graph does not show."""

_STATIC: frozenset[type[Pass]] = frozenset(
    {PlaceQuantizers, Calibrate, SplitOutlierChannels, InsertActivationQdq}
)
"""Those that only calibrated activations need."""

_LOWERING: dict[type[Pass], PassFactory] = {
    QuantizeBiases: lambda plan: QuantizeBiases(),
    DecomposeGemm: lambda plan: DecomposeGemm(),
    LowerMatMulNBits: lambda plan: LowerMatMulNBits(),
    LowerEmbeddings: lambda plan: LowerEmbeddings(),
    LowerDynamicQuantization: lambda plan: LowerDynamicQuantization(),
    DecodeAtLoad: lambda plan: DecodeAtLoad(),
    IsolateFloatOps: lambda plan: IsolateFloatOps(),
}
"""Which of them run, and in which order, says the target."""

_VERIFYING: dict[type[Pass], PassFactory] = {
    VerifyTarget: lambda plan: VerifyTarget(VerifyTargetOptions(plan.target)),
}

_FACTORIES = _CANONICALIZING | _QUANTIZING | _LOWERING | _VERIFYING

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
    # Rounding inserts for itself: it compares with the float model it began with.
    reconstructing = plan.reconstruct is not Reconstruction.NONE
    left_out |= frozenset(_INSERTING) if reconstructing else {RoundWeights}
    # What is rounded for its output has next to no mean error left.
    if plan.calibration is None or reconstructing or not plan.correct_bias:
        left_out |= {CorrectBias}
    if not plan.never_slower:
        left_out |= {DropSlowRegions}
    if plan.bound is None:
        left_out |= {AssignFallbacks}
    if plan.islands is None:
        left_out |= {AssignIslands}
    quantizing = [kind for kind in _QUANTIZING if kind not in left_out]
    return passes + _made([*quantizing, *_lowering(plan), *_VERIFYING], plan)


def _lowering(plan: Plan) -> list[type[Pass]]:
    return [PASSES[name] for name in plan.target.lowering]


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
