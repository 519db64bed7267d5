"""What a compilation is made of: its options, and the passes they lead to, in order."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration.calls import SampleOptions, Samples
from qcompiler.calibration.observers import DEFAULT_PERCENTILE, Observer
from qcompiler.calibration.samples import open_samples
from qcompiler.errors import UsageError
from qcompiler.passes.assign.assign_schemes import AssignOptions, AssignSchemes
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
from qcompiler.passes.lower.decode_at_load import DecodeAtLoad
from qcompiler.passes.lower.decompose_gemm import DecomposeGemm
from qcompiler.passes.lower.lower_dynamic_quantization import LowerDynamicQuantization
from qcompiler.passes.lower.lower_embeddings import LowerEmbeddings
from qcompiler.passes.lower.lower_matmul_nbits import LowerMatMulNBits
from qcompiler.passes.lower.verify_target import VerifyTarget, VerifyTargetOptions
from qcompiler.passes.quantize.calibrate import Calibrate, CalibrateOptions
from qcompiler.passes.quantize.insert_activation_qdq import InsertActivationQdq
from qcompiler.passes.quantize.insert_qdq import InsertQdq, InsertQdqOptions
from qcompiler.passes.quantize.split_outlier_channels import SplitOutlierChannels
from qcompiler.quant.qtype import qtype_of
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.recipe import Recipe
from qcompiler.quant.scheme import Activations, QScheme, parse_scheme
from qcompiler.rewriting.base import Pass
from qcompiler.rewriting.legality import OPSET_OF
from qcompiler.rewriting.user_pass import RunUserPass
from qcompiler.targets.capability import Target
from qcompiler.targets.registry import find_target


class Verification(StrEnum):
    """How much is checked after every pass."""

    STRUCTURE = "structure"
    """Use-def, topology, the stage's legality rules, ONNX's checker at stage boundaries."""
    NUMERICS = "numerics"
    """All of that, and the model's outputs against those before the pass."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How ranges of activations are found.

    Attributes:
        source: Where the samples are: see `calibration.samples.open_samples`.
        samples: How they are read.
        observer: How ranges are chosen; None tries each on a few calls and takes the best.
        percentile: For that observer: percent of the values to keep.
        outlier_channels: Channels of one value that may stay in float at most.
        memory_budget: Bytes the process may take while it calibrates.
        statistics: A file that statistics are kept in and reused from.
    """

    source: str
    samples: SampleOptions = field(default_factory=SampleOptions)
    observer: Observer | None = None
    percentile: float = DEFAULT_PERCENTILE
    outlier_channels: int = 8
    memory_budget: int = 2 << 30
    statistics: Path | None = None


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What a compilation is asked to do.

    Attributes:
        scheme: Text form of one scheme for every site; None takes the target's default.
        recipe: Path of a TOML recipe, or a `Recipe`; excludes `scheme`.
        target: Name of the target.
        exclude: Node name patterns (glob, or /regex/) that stay in float.
        calibration: Samples that activation ranges come from, None without; a text is where
            they are.
        weight_range: How weight clipping ranges are chosen; None takes the recipe's, or
            "weighted-mse".
        user_passes: `module:function` references, run on the canonical model in this order.
        verify: How much is checked after every pass.
        samples: An .npz file with one call's inputs for `verify="numerics"`; None makes them up.
        seed: Seed of made-up inputs.
        dump_ir: Folder that gets the model after every pass, or None.
        external_data: Whether weights go to a file of their own; None decides by size.
        custom_op_libraries: Shared libraries with custom operators for ONNX Runtime.
        inspect_kernels: Whether to load the result in the target's runtime and see what runs.
        workers: Threads for quantizing; None is the number of processors.
        memory_limit: Bytes of weights loaded at once when the runtime is inspected.
    """

    scheme: str | None = None
    recipe: Path | Recipe | None = None
    target: str = "onnxruntime"
    exclude: tuple[str, ...] = ()
    calibration: CalibrationOptions | str | None = None
    weight_range: RangeMethod | None = None
    user_passes: tuple[str, ...] = ()
    verify: Verification = Verification.STRUCTURE
    samples: Path | None = None
    seed: int = 0
    dump_ir: Path | None = None
    external_data: bool | None = None
    custom_op_libraries: tuple[Path, ...] = ()
    inspect_kernels: bool = True
    workers: int | None = None
    memory_limit: int = 64 << 20


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """What calibration needs and only a loaded model gives.

    Attributes:
        samples: The calls to run the model on.
        model_fingerprint: Returns the fingerprint of the source model.
    """

    samples: Samples
    model_fingerprint: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Plan:
    """Options with every name looked up, so that what follows cannot fail on a typo.

    Attributes:
        target: The capability table.
        recipe: What each site is asked to get.
        weight_range: How weight ranges are chosen.
        opset: The ai.onnx opset the recipe's schemes need on this target.
        user_passes: The users' own passes.
        calibration: How ranges of activations are found, None where no scheme needs any.
        custom_op_libraries: Shared libraries with custom operators for ONNX Runtime.
        data: The opened samples, and what gives the fingerprint of the source model; None until
            the model is known.
    """

    target: Target
    recipe: Recipe
    weight_range: RangeMethod
    opset: int
    user_passes: tuple[Pass, ...] = field(default=())
    calibration: CalibrationOptions | None = None
    custom_op_libraries: tuple[Path, ...] = ()
    data: CalibrationData | None = None


def make_plan(options: CompileOptions) -> Plan:
    """Look up the target, read the recipe and import user passes.

    Raises:
        UsageError: An option names something that does not exist, or two contradict each other.
    """
    target = find_target(options.target)
    recipe = _recipe(options, target)
    schemes = [recipe.default, *(rule.scheme for rule in recipe.rules)]
    opset = max(target.opset_min, *(_opset_for(scheme) for scheme in schemes))
    return Plan(
        target,
        recipe,
        options.weight_range or recipe.weight_range or RangeMethod.WEIGHTED_MSE,
        opset,
        tuple(RunUserPass(reference) for reference in options.user_passes),
        _calibration(options, schemes),
        options.custom_op_libraries,
    )


def _calibration(
    options: CompileOptions, schemes: Sequence[QScheme | None]
) -> CalibrationOptions | None:
    """Return how to calibrate, None where no scheme needs it."""
    static = next((s for s in schemes if s and s.activations is Activations.STATIC), None)
    if static is None:
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
    samples = open_samples(plan.calibration.source, model, plan.calibration.samples)
    return replace(plan, data=CalibrationData(samples, model_fingerprint))


def _calibrate_options(plan: Plan) -> CalibrateOptions:
    options, data = plan.calibration, plan.data
    if options is None or data is None:
        message = "calibrate needs samples"
        raise UsageError(message, hint="give --calibration DATA and a scheme such as w8a8")
    return CalibrateOptions(
        data.samples,
        data.model_fingerprint,
        options.observer,
        (SplitOutlierChannels(), InsertActivationQdq()),
        options.percentile,
        options.outlier_channels,
        options.memory_budget,
        options.statistics,
        plan.custom_op_libraries,
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

_CANONICALIZING: dict[str, PassFactory] = {
    InlineFunctions.name: lambda plan: InlineFunctions(),
    ConvertOpset.name: lambda plan: ConvertOpset(
        ConvertOpsetOptions(plan.opset, plan.target.opset_max)
    ),
    LiftConstants.name: lambda plan: LiftConstants(),
    EliminateIdentity.name: lambda plan: EliminateIdentity(),
    FoldConstants.name: lambda plan: FoldConstants(),
    FoldBatchNorm.name: lambda plan: FoldBatchNorm(),
    Deduplicate.name: lambda plan: Deduplicate(),
    EliminateDead.name: lambda plan: EliminateDead(),
    AssignNames.name: lambda plan: AssignNames(),
    VerifyCanonical.name: lambda plan: VerifyCanonical(),
}

_QUANTIZING: dict[str, PassFactory] = {
    AssignSchemes.name: lambda plan: AssignSchemes(AssignOptions(plan.recipe, plan.target)),
    PlaceQuantizers.name: lambda plan: PlaceQuantizers(PlaceOptions(plan.target.placement)),
    Calibrate.name: lambda plan: Calibrate(_calibrate_options(plan)),
    SplitOutlierChannels.name: lambda plan: SplitOutlierChannels(),
    InsertActivationQdq.name: lambda plan: InsertActivationQdq(),
    InsertQdq.name: lambda plan: InsertQdq(InsertQdqOptions(plan.weight_range)),
}

_STATIC = frozenset(
    {PlaceQuantizers.name, Calibrate.name, SplitOutlierChannels.name, InsertActivationQdq.name}
)
"""Those that only calibrated activations need."""

_LOWERING: dict[str, PassFactory] = {
    DecomposeGemm.name: lambda plan: DecomposeGemm(),
    LowerMatMulNBits.name: lambda plan: LowerMatMulNBits(),
    LowerEmbeddings.name: lambda plan: LowerEmbeddings(),
    LowerDynamicQuantization.name: lambda plan: LowerDynamicQuantization(),
    DecodeAtLoad.name: lambda plan: DecodeAtLoad(),
}
"""Which of them run, and in which order, says the target."""

_VERIFYING: dict[str, PassFactory] = {
    VerifyTarget.name: lambda plan: VerifyTarget(VerifyTargetOptions(plan.target)),
}

PASSES: dict[str, PassFactory] = _CANONICALIZING | _QUANTIZING | _LOWERING | _VERIFYING
"""Every pass by name, in the order of the pipeline."""

_CLEANING_UP = (
    LiftConstants.name,
    FoldConstants.name,
    Deduplicate.name,
    EliminateDead.name,
    AssignNames.name,
    VerifyCanonical.name,
)
"""What brings a model that a user's pass changed back to canonical form."""


def pipeline(plan: Plan) -> list[Pass]:
    """Return the passes of a compilation, in order."""
    passes = _made(_CANONICALIZING, plan)
    if plan.user_passes:
        passes += [*plan.user_passes, *_made(_CLEANING_UP, plan)]
    quantizing = [
        name for name in _QUANTIZING if plan.calibration is not None or name not in _STATIC
    ]
    return passes + _made([*quantizing, *plan.target.lowering, *_VERIFYING], plan)


def _made(names: Iterable[str], plan: Plan) -> list[Pass]:
    return [PASSES[name](plan) for name in names]


def pass_named(name: str, plan: Plan) -> Pass:
    """Return one pass, ready to run.

    Raises:
        UsageError: No pass has this name; the message lists those that do.
    """
    if name not in PASSES:
        message = f"no pass is called {name!r}"
        raise UsageError(message, hint=f"passes: {', '.join(PASSES)}")
    return PASSES[name](plan)
