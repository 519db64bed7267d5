"""What a compilation is asked to do."""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from qcompiler.calibration.calls import SampleOptions
from qcompiler.calibration.observers import DEFAULT_PERCENTILE, Observer
from qcompiler.errors import UsageError
from qcompiler.quant.equalization import EqualizationMethod, InsertMul
from qcompiler.quant.islands import IslandRequest
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.recipe import Recipe


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
        is_task: Whether the source is that of a task (`calibration.task_calls.open_task`).
    """

    source: str
    samples: SampleOptions = field(default_factory=SampleOptions)
    observer: Observer | None = None
    percentile: float = DEFAULT_PERCENTILE
    outlier_channels: int = 8
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
    """

    method: EqualizationMethod | None = EqualizationMethod.AUTO
    alpha: float = 0.5
    percentile: float | None = None
    insert_mul: InsertMul = InsertMul.NORMS


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
        scheme: Text form of one scheme for every site; None takes the target's default.
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
        islands: Which parts of weights keep more bits; None takes the recipe's answer. It chooses
            codes as "gptq" does, and takes samples of the task, or calibration samples, on which
            the outputs of the float model are the task.
        task: What the model is to be good at, for islands. Without other samples, its own are what
            codes are chosen on.
        device: Where PyTorch computes: "cpu", "cuda", "cuda:1".
        min_output_sqnr: Least SQNR of the outputs in dB: the most sensitive ops fall back from w8a8
            to w8a16 until it holds; None asks for none.
        metric: `module:function` that measures a model, higher is better (`calibration.metric`).
        max_metric_drop: By how much it may be below the float model's; goes with `metric`.
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
    equalization: EqualizationOptions | None = None
    correct_bias: bool | None = None
    reconstruct: Reconstruction = Reconstruction.NONE
    islands: IslandRequest | None = None
    task: TaskOptions | None = None
    device: str = "cpu"
    min_output_sqnr: float | None = None
    metric: str | None = None
    max_metric_drop: float | None = None
    never_slower: bool | None = None
    measurements: Path | None = None
    threads: int | None = None
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


def with_islands(options: CompileOptions) -> CompileOptions:
    """Return options with what islands imply: codes by GPTQ, on the task's samples if no others.

    Raises:
        UsageError: There are no samples.
    """
    options = replace(options, reconstruct=Reconstruction.GPTQ)
    if options.calibration is not None:
        return options
    if options.task is None:
        message = "islands need samples to see what the model depends on"
        raise UsageError(message, where="--islands", hint="give --task FILE or --calibration DATA")
    task = options.task
    calibration = CalibrationOptions(
        task.source, task.samples, memory_budget=task.memory_budget, is_task=True
    )
    return replace(options, calibration=calibration)
