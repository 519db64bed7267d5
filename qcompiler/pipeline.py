"""What a compilation is made of: its options, and the passes they lead to, in order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from qcompiler.errors import UsageError
from qcompiler.passes.assign.assign_schemes import AssignOptions, AssignSchemes
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
from qcompiler.passes.quantize.insert_qdq import InsertQdq, InsertQdqOptions
from qcompiler.quant.qtype import qtype_of
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.recipe import Recipe
from qcompiler.quant.scheme import QScheme, parse_scheme
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
class CompileOptions:
    """What a compilation is asked to do.

    Attributes:
        scheme: Text form of one scheme for every site; None takes the target's default.
        recipe: Path of a TOML recipe, or a `Recipe`; excludes `scheme`.
        target: Name of the target.
        exclude: Node name patterns (glob, or /regex/) that stay in float.
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
class Plan:
    """Options with every name looked up, so that what follows cannot fail on a typo.

    Attributes:
        target: The capability table.
        recipe: What each site is asked to get.
        weight_range: How weight ranges are chosen.
        opset: The ai.onnx opset the recipe's schemes need on this target.
        user_passes: The users' own passes.
    """

    target: Target
    recipe: Recipe
    weight_range: RangeMethod
    opset: int
    user_passes: tuple[Pass, ...] = field(default=())


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
        scheme = parse_scheme(options.scheme or target.default_scheme)
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
    InsertQdq.name: lambda plan: InsertQdq(InsertQdqOptions(plan.weight_range)),
}

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
    return passes + _made([*_QUANTIZING, *plan.target.lowering, *_VERIFYING], plan)


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
