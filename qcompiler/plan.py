"""What is going to be done: options with every name looked up, and what they need of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from qcompiler.bounds import Gate
from qcompiler.calibration.calls import Samples
from qcompiler.calibration.held_out import hold_out
from qcompiler.calibration.metric import OutputBound, output_bound
from qcompiler.calibration.samples import open_samples
from qcompiler.calibration.task_calls import Task, open_task
from qcompiler.errors import TargetError, UsageError
from qcompiler.options import (
    CalibrationOptions,
    CompileOptions,
    EqualizationOptions,
    Reconstruction,
    TaskOptions,
    requested_recipe,
    with_islands,
)
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.recipe import Recipe
from qcompiler.quant.reconstruction import BlockReconstruction
from qcompiler.quant.scheme import Activations, QScheme
from qcompiler.rewriting.base import Pass
from qcompiler.rewriting.legality import OPSET_OF
from qcompiler.rewriting.user_pass import RunUserPass
from qcompiler.rewriting.work_folder import windows_in
from qcompiler.targets.capability import Target
from qcompiler.targets.processors import without_type
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
        blocks: What is learned of blocks.
        task: What the model is to be good at, for islands; None is what it returns in float.
        windows: Folder of finished windows of blocks, or None.
        device: Where PyTorch computes.
        custom_op_libraries: Shared libraries with custom operators for ONNX Runtime.
        data: The opened samples, and what gives the fingerprint of the source model; None until
            the model is known.
        bound: What must hold of the outputs, or None.
        hold_out: Whether the last quarter of the calls chooses nothing, and only judges.
        gradients: Folder that gradients of tasks are kept in, or None.
        never_slower: Whether latency is measured.
        measurements: The file that latencies are kept in, or None.
        threads: Threads of one operator when latency is measured, None for the runtime's own.
        cast_io: Whether inputs and outputs get the type that is computed in.
        gate: What the result must keep, or None; it decides no byte of it, and is not in `recipe`.
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
    blocks: BlockReconstruction = field(default_factory=BlockReconstruction)
    task: TaskOptions | None = None
    windows: Path | None = None
    device: str = "cpu"
    custom_op_libraries: tuple[Path, ...] = ()
    data: CalibrationData | None = None
    bound: OutputBound | None = None
    hold_out: bool = False
    gradients: Path | None = None
    never_slower: bool = False
    measurements: Path | None = None
    threads: int | None = None
    cast_io: bool = False
    gate: Gate | None = None

    @property
    def quantizing(self) -> bool:
        """Whether any op is asked to get integer weights."""
        rules = self.recipe.rules
        return self.recipe.default is not None or any(rule.scheme is not None for rule in rules)


def make_plan(options: CompileOptions) -> Plan:
    """Look up the target, read the recipe and import user passes.

    Raises:
        UsageError: An option names something that does not exist, or two contradict each other.
    """
    target = find_target(options.target)
    recipe = requested_recipe(options, target)
    gate = _gate(options, recipe)
    recipe = replace(recipe, gate=None, islands=options.islands or recipe.islands)
    if recipe.islands is not None:
        options = with_islands(options)
    schemes = [recipe.default, *(rule.scheme for rule in recipe.rules)]
    opset = max(target.opset_min, *(_opset_for(scheme) for scheme in schemes))
    opset = opset if recipe.compute_type is None else max(opset, recipe.compute_type.opset)
    static = any(scheme and scheme.activations is Activations.STATIC for scheme in schemes)
    _require_integers(target, schemes)
    equalization = options.equalization or EqualizationOptions(recipe.equalize)
    correct_bias = recipe.correct_bias if options.correct_bias is None else options.correct_bias
    sampled = (
        equalization.method is not None
        or correct_bias
        or options.reconstruct is not Reconstruction.NONE
        or recipe.compute_type is not None
        or options.engine is not None
        or options.engine_elsewhere
    )
    calibration = _calibration(options, schemes, sampled=sampled)
    _require_integer_codes(options, recipe, schemes)
    if options.reconstruct is not Reconstruction.NONE and calibration is None:
        message = f"--reconstruct {options.reconstruct} needs samples to see what ops compute"
        raise UsageError(message, hint="give --calibration DATA")
    if options.never_slower and not target.runs_here:
        message = f"latency of {target.title} cannot be measured by ONNX Runtime"
        raise UsageError(message, hint="leave --never-slower out, and time the engine")
    if options.cast_io and recipe.compute_type is None:
        message = "inputs and outputs are to be cast, and no type is given to cast them to"
        raise UsageError(message, where="--cast-io", hint="give --compute-type float16")
    if options.never_slower and not static:
        message = "there are no integer regions to measure without calibrated activations"
        raise UsageError(message, hint="give --calibration DATA, or leave --never-slower out")
    bound = _bound(options, static=static)
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
        options.blocks,
        options.task,
        None if options.work_dir is None else windows_in(options.work_dir),
        options.device,
        options.custom_op_libraries,
        bound=bound,
        hold_out=options.hold_out or bound is not None,
        gradients=options.gradients,
        never_slower=static and target.runs_here and options.never_slower is not False,
        measurements=options.measurements,
        threads=options.threads,
        cast_io=options.cast_io,
        gate=gate,
    )


def _require_integers(target: Target, schemes: Sequence[QScheme | None]) -> None:
    """Refuse calibrated activations that a target multiplies by no weights of such bits.

    Raises:
        TargetError: Every op would stay in float.
    """
    for scheme in schemes:
        static = scheme is not None and scheme.activations is Activations.STATIC
        if scheme is not None and scheme.floating:
            _require_float8(target, scheme)
        elif scheme is not None and static and not target.has_integers(scheme):
            message = f"{target.title} multiplies no integers as {scheme} has them"
            hint = (
                "give w8a8 or w4a16:b128; to see what it costs in accuracy, --target emulation, "
                "which computes in float"
            )
            raise TargetError(message, hint=hint, reason="no-such-integers")


def _require_float8(target: Target, scheme: QScheme) -> None:
    """Refuse floats of 8 bits where the target, or one of its processors, does not multiply them.

    Raises:
        TargetError: Every op would stay in float.
    """
    if not target.has_integers(scheme):
        message = f"{target.title} has no products of {scheme.weight_type.onnx_name}"
        hint = (
            "give w8a8, or a target that has them: tensorrt-rtx:sm89; to see what it costs in "
            "accuracy, --target emulation, which computes in float"
        )
        raise TargetError(message, hint=hint, reason="no-such-floats")
    stored = scheme.weight_type.onnx_name
    without = without_type(target.processors, stored)
    if without:
        capable = [one.name.lower() for one in target.known_processors if stored in one.code_types]
        message = f"{', '.join(without)} has no {stored}"
        name = target.name.partition(":")[0]
        hint = f"name processors that have: --target {name}:{','.join(capable)}; or give w8a8"
        raise TargetError(message, hint=hint, reason="no-such-floats")


def _require_integer_codes(
    options: CompileOptions, recipe: Recipe, schemes: Sequence[QScheme | None]
) -> None:
    """Refuse to choose codes by learning, or islands, where codes are floats.

    Raises:
        UsageError: What is asked for moves codes by whole steps.
    """
    floating = next((scheme for scheme in schemes if scheme is not None and scheme.floating), None)
    if floating is None:
        return
    asked = "islands" if recipe.islands is not None else f"--reconstruct {options.reconstruct}"
    if recipe.islands is not None or options.reconstruct is not Reconstruction.NONE:
        message = f"{asked} cannot be had with {floating}: it works on codes of equal steps"
        hint = "leave it out (of a search: --islands none), or give w8a8; weights go to the nearest"
        raise UsageError(message, hint=hint, reason="integer-codes-only")


def _gate(options: CompileOptions, recipe: Recipe) -> Gate | None:
    gate = options.gate if recipe.gate is None else recipe.gate.merged(options.gate)
    if gate is None or gate.data is not None or options.calibration is None:
        return gate
    calibration = options.calibration
    return replace(gate, data=calibration if isinstance(calibration, str) else calibration.source)


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
    if plan.recipe.islands is not None or samples is None:
        source = None if plan.task is None else plan.task.source
        choosing = None if samples is None else choosing_samples(plan, samples)
        task = open_task(source, model, (plan.task or options).samples, choosing)
    if samples is None:
        assert task is not None
        samples = task.samples()
        task = task.first(len(choosing_samples(plan, samples)))
    return replace(plan, data=CalibrationData(samples, model_fingerprint, task))


def choosing_samples(plan: Plan, samples: Samples) -> Samples:
    """Return the samples that may choose something: what judges must not have chosen."""
    return hold_out(samples)[0] if plan.hold_out else samples


def _bound(options: CompileOptions, *, static: bool) -> OutputBound | None:
    bound = output_bound(options.min_output_sqnr, options.metric, options.max_metric_drop)
    if bound is not None and not static:
        message = f"{bound.option} chooses which ops keep calibrated activations, and none has any"
        raise UsageError(message, hint="give --calibration DATA and a scheme such as w8a8")
    return bound


def _opset_for(scheme: QScheme | None) -> int:
    """Return the opset in which a scheme's codes can be written, blocked or not."""
    blocked = OPSET_OF["block_size"]
    if scheme is None:
        return blocked
    stored = scheme.weight_type.onnx_name
    return max(blocked, OPSET_OF.get(stored, blocked))
