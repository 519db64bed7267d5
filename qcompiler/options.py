"""What a compilation is asked to do."""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from qcompiler.bounds import Gate
from qcompiler.calibration.calls import SampleOptions
from qcompiler.calibration.observers import DEFAULT_PERCENTILE, Observer
from qcompiler.errors import UsageError
from qcompiler.export.to_tensorrt import EngineOptions
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.equalization import EqualizationMethod, InsertMul
from qcompiler.quant.islands import IslandRequest
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.recipe import Recipe
from qcompiler.quant.reconstruction import BlockReconstruction
from qcompiler.quant.scheme import FLOAT, parse_scheme
from qcompiler.targets.capability import Target


class Verification(StrEnum):
    """How much is checked after every pass."""

    STRUCTURE = "structure"
    """Use-def, topology, the stage's legality rules, ONNX's checker at stage boundaries."""
    NUMERICS = "numerics"
    """All of that, and the model's outputs against those before the pass."""


class Reconstruction(StrEnum):
    """How codes of weights are chosen."""

    NONE = "none"
    """Each weight alone, to the nearest code; needs no samples."""
    GPTQ = "gptq"
    """Column by column, so that errors make up for each other in the ops' outputs."""
    CBQ = "cbq"
    """Learned over windows of blocks, so that these give what they give in float."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How ranges of activations are found.

    Attributes:
        source: Where the samples are: see `calibration.samples.open_samples`.
        samples: How they are read.
        observer: How ranges are chosen; None tries each on a few calls and takes the best.
        percentile: For that observer: percent of the values to keep.
        outlier_channels: Channels of one value that may stay in float at most.
        two_terms_below: An activation of a product gets two terms of codes where the median of its
            sizes is fewer steps; 0 is never.
        memory_budget: Bytes the process may take while it calibrates.
        statistics: A file that statistics are kept in and reused from.
        is_task: Whether the source is that of a task (`calibration.task_calls.open_task`).
    """

    source: str
    samples: SampleOptions = field(default_factory=SampleOptions)
    observer: Observer | None = None
    percentile: float = DEFAULT_PERCENTILE
    outlier_channels: int = 8
    two_terms_below: float = 3.0
    memory_budget: int = 2 << 30
    statistics: Path | None = None
    is_task: bool = False


@dataclass(frozen=True, slots=True)
class EqualizationOptions:
    """How range is moved between activations and weights; it takes samples.

    Attributes:
        method: Which scales are tried; None leaves the model as it is.
        alpha: For `smoothquant`: how much of the activation's range goes to the weights.
        percentile: Percent of an activation's values that its range covers; None is all.
        insert_mul: Where a Mul may be put in front of ops whose data no constant can scale.
        check: Whether `auto` quantizes the whole model with and without scales, and undoes those
            that the outputs gain nothing by. It takes ranges and corrections of biases twice more.
    """

    method: EqualizationMethod | None = EqualizationMethod.AUTO
    alpha: float = 0.5
    percentile: float | None = None
    insert_mul: InsertMul = InsertMul.NORMS
    check: bool = True


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What the model is to be good at.

    Attributes:
        source: Where its samples are: see `calibration.task_calls.open_task`.
        samples: How they are read.
        memory_budget: Bytes the process may take, where there are no other samples.
    """

    source: str
    samples: SampleOptions = field(default_factory=SampleOptions)
    memory_budget: int = 2 << 30


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What a compilation is asked to do.

    Attributes:
        scheme: Text form of one scheme for every site, or "float16" or "bfloat16": float weights,
            and all of the model cast to that type. None takes the target's default.
        compute_type: The same types, beside any scheme or recipe: what floats are cast to. None
            leaves them, or takes the recipe's.
        float32: Node name patterns that stay in float32 all the same.
        cast_io: Whether float inputs and outputs of the model get that type, too.
        recipe: Path of a TOML recipe, or a `Recipe`; excludes `scheme`.
        target: Name of the target.
        exclude: Node name patterns (glob, or /regex/) that stay in float.
        calibration: Samples that activation ranges come from, None without; a text is where
            they are.
        equalization: How channels are equalized where there are samples; None takes the recipe's
            method, or "auto".
        correct_bias: Whether the mean error of output channels is taken out of biases; it takes
            samples. None takes the recipe's answer.
        reconstruct: How codes of weights are chosen; all but "none" take samples and PyTorch.
        blocks: What "cbq" learns, and how.
        islands: Which parts of weights keep more bits; None takes the recipe's answer. It takes
            samples of the task, or calibration samples, on which the outputs of the float model
            are the task; codes are chosen as by "gptq" unless "cbq" is asked for.
        task: What the model is to be good at, for islands. Without other samples, its own are what
            codes are chosen on.
        device: Where PyTorch computes: "cpu", "cuda", "cuda:1".
        min_output_sqnr: Least SQNR of the outputs in dB: the most sensitive ops fall back from w8a8
            to w8a16 until it holds; None asks for none.
        metric: `module:function` that measures a model, higher is better (`calibration.metric`).
        max_metric_drop: By how much it may be below the float model's; goes with `metric`.
        hold_out: Whether the last quarter of the calls chooses nothing, so that it can judge; a
            bound on the outputs implies it.
        gradients: Folder that gradients of tasks are kept in and reused from; None keeps none.
        never_slower: Whether every integer region is measured against float, and changed where it
            loses; None does so where there are samples.
        measurements: A JSON file that measured latencies are kept in and reused from, so that the
            same compilation gives the same bytes; None keeps none.
        threads: Threads of one operator when latency is measured; None leaves it to the runtime.
        weight_range: How weight clipping ranges are chosen; None takes the recipe's, or
            "weighted-mse".
        user_passes: `module:function` references, run on the canonical model in this order.
        verify: How much is checked after every pass.
        samples: An .npz file with one call's inputs for `verify="numerics"`; None makes them up.
        seed: Seed of made-up inputs.
        dump_ir: Folder that gets the model after every pass, or None.
        work_dir: Folder that keeps the newest intermediate model, so that the same compilation goes
            on there when it was stopped; it is emptied at the end. None keeps nothing.
        external_data: Whether weights go to a file of their own; None decides by size.
        custom_op_libraries: Shared libraries with custom operators for ONNX Runtime.
        inspect_kernels: Whether to load the result in the target's runtime and see what runs.
        compare: Whether the result is compared with the source on the samples, at its outputs and
            along the network. Without, reports lack both.
        engine: Where an engine goes that is built from the result, None for none; an output that
            ends in .engine or .plan is one, too.
        engine_elsewhere: Whether an engine is built from the result on another machine: its options
            are checked, and shapes taken from the samples, but nothing is built.
        engine_options: How it is built. Its library is the target's; shapes that its profile does
            not give come from the samples.
        workers: Threads for quantizing; None is the number of processors.
        gate: What the result must keep to be written, over what the recipe says; None leaves it to
            the recipe. Without data of its own it is judged on the samples of calibration.
        gate_samples: How the gate's data is read.
        memory_limit: Bytes of weights loaded at once when the runtime is inspected.
        html: Whether the report is also written as a page for a browser.
    """

    scheme: str | None = None
    compute_type: ComputeType | None = None
    float32: tuple[str, ...] = ()
    cast_io: bool = False
    recipe: Path | Recipe | None = None
    target: str = "onnxruntime"
    exclude: tuple[str, ...] = ()
    calibration: CalibrationOptions | str | None = None
    equalization: EqualizationOptions | None = None
    correct_bias: bool | None = None
    reconstruct: Reconstruction = Reconstruction.NONE
    blocks: BlockReconstruction = field(default_factory=BlockReconstruction)
    islands: IslandRequest | None = None
    task: TaskOptions | None = None
    device: str = "cpu"
    min_output_sqnr: float | None = None
    metric: str | None = None
    max_metric_drop: float | None = None
    hold_out: bool = False
    gradients: Path | None = None
    never_slower: bool | None = None
    measurements: Path | None = None
    threads: int | None = None
    weight_range: RangeMethod | None = None
    user_passes: tuple[str, ...] = ()
    verify: Verification = Verification.STRUCTURE
    samples: Path | None = None
    seed: int = 0
    dump_ir: Path | None = None
    work_dir: Path | None = None
    external_data: bool | None = None
    custom_op_libraries: tuple[Path, ...] = ()
    inspect_kernels: bool = True
    compare: bool = True
    engine: Path | None = None
    engine_elsewhere: bool = False
    engine_options: EngineOptions = field(default_factory=EngineOptions)
    workers: int | None = None
    memory_limit: int = 64 << 20
    gate: Gate | None = None
    gate_samples: SampleOptions = field(default_factory=SampleOptions)
    html: bool = True


def requested_recipe(options: CompileOptions, target: Target) -> Recipe:
    """Return the recipe that options ask for, with all that they add to it.

    Raises:
        UsageError: Options contradict each other, or the recipe cannot be read.
    """
    if options.scheme in set(ComputeType):
        compute = ComputeType(options.scheme)
        if options.compute_type not in (None, compute):
            message = f"the scheme {compute} and the compute type {options.compute_type} differ"
            raise UsageError(message, hint="give one of them")
        options = replace(options, scheme=FLOAT, compute_type=compute)
    recipe = _schemes(options, target)
    return recipe.computing_in(options.compute_type, options.float32)


def _schemes(options: CompileOptions, target: Target) -> Recipe:
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


def with_islands(options: CompileOptions) -> CompileOptions:
    """Return options with what islands imply: codes by what they do, on samples of the task.

    Raises:
        UsageError: There are no samples.
    """
    if options.reconstruct is Reconstruction.NONE:
        options = replace(options, reconstruct=Reconstruction.GPTQ)
    return options if options.calibration is not None else with_samples(options)


def with_samples(options: CompileOptions) -> CompileOptions:
    """Return options whose samples are those of the task.

    Raises:
        UsageError: There is no task.
    """
    if options.task is None:
        message = "islands need samples to see what the model depends on"
        raise UsageError(message, where="--islands", hint="give --task FILE or --calibration DATA")
    task = options.task
    calibration = CalibrationOptions(
        task.source, task.samples, memory_budget=task.memory_budget, is_task=True
    )
    return replace(options, calibration=calibration)
