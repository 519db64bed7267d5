"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.byte_sizes import parse_size
from qcompiler.quant.compute_type import ComputeType

if TYPE_CHECKING:
    from qcompiler.calibration.calls import SampleOptions
    from qcompiler.options import CalibrationOptions, EqualizationOptions
    from qcompiler.quant.ranges import RangeMethod
    from qcompiler.quant.reconstruction import BlockReconstruction

MODEL = click.Path(path_type=Path)

SOURCE_HELP = (
    "Samples: .npz/.npy or a folder of them, ONNX test_data_set folders, Polygraphy .json, "
    ".txt/.jsonl with --tokenizer, a folder of images with --image-spec, MODULE:FUNCTION, random."
)

DEFAULT_PERCENTILE = 99.99
"""As in `calibration.observers`, which is not imported for `--help`."""
_CALIBRATION = (
    *("calibration", "max_samples", "batch_size", "tokenizer", "sequence_length", "image_spec"),
    *("max_tokens", "text_field"),
    *("observer", "percentile", "outlier_channels", "two_terms_below"),
    *("memory_budget", "statistics", "seed"),
)

_SAMPLES = (
    *("max_samples", "batch_size", "tokenizer", "sequence_length", "image_spec"),
    *("max_tokens", "text_field", "seed"),
)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _compute_type(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> ComputeType | None:
    return None if value is None else ComputeType(value)


def _range_method(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> "RangeMethod | None":
    from qcompiler.quant.ranges import RangeMethod  # it takes NumPy, which --help does not

    return None if value is None else RangeMethod(value)


def report_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add how the result is printed."""
    kinds = click.Choice(["table", "json"])
    return click.option("--report", type=kinds, default="table", show_default=True)(command)


def custom_ops_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add libraries with the kernels of custom operators."""
    text = "Custom op library."
    return click.option("--custom-ops", type=MODEL, multiple=True, metavar="LIB", help=text)(
        command
    )


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that decide which site gets which scheme."""
    decorators: list[Decorator] = [
        click.option("--scheme", metavar="S", help="Scheme of every site; see --list schemes."),
        click.option(
            "--compute-type",
            type=click.Choice([member.value for member in ComputeType]),
            callback=_compute_type,
            help="Cast what is left in float to 16 bits, but for what they would spoil.",
        ),
        click.option(
            "--float32",
            metavar="PATTERN",
            multiple=True,
            help="With it, keep these nodes in float32: a glob, or /regex/. Repeatable.",
        ),
        click.option(
            "--cast-io/--keep-io",
            default=False,
            help="With it, cast inputs and outputs as well.  [default: keep-io]",
        ),
        click.option(
            "--recipe", metavar="FILE", type=MODEL, help="TOML rules: which site, which scheme."
        ),
        click.option("--target", metavar="T", default="onnxruntime", show_default=True),
        click.option(
            "--exclude",
            metavar="PATTERN",
            multiple=True,
            help="Leave these nodes in float: a glob on names, or /regex/. Repeatable.",
        ),
        click.option(
            "--weight-range",
            type=click.Choice(["weighted-mse", "mse", "min-max"]),
            callback=_range_method,
            help="How weight clipping ranges are chosen.  [default: weighted-mse]",
        ),
        click.option(
            "--user-pass",
            "user_passes",
            metavar="MODULE:FUNCTION",
            multiple=True,
            help="Run this function over the canonical model. Repeatable.",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _sample_options() -> list[Decorator]:
    """Return the options that say how samples are read."""
    return [
        click.option(
            "--max-samples", type=click.IntRange(min=1), help="Use at most so many.  [default: all]"
        ),
        click.option(
            "--batch-size", type=click.IntRange(min=1), help="Samples in one call of the model."
        ),
        click.option("--tokenizer", type=MODEL, metavar="FILE", help="tokenizer.json, for texts."),
        click.option(
            "--sequence-length",
            type=click.IntRange(min=1),
            help="Pack texts to so many tokens.  [default: one text a row]",
        ),
        click.option(
            "--max-tokens", type=click.IntRange(min=1), help="Cut texts off that are not packed."
        ),
        click.option(
            "--text-field", default="text", show_default=True, help="Field of .jsonl lines."
        ),
        click.option("--image-spec", metavar="SPEC", help="size=224,mean=..., or a TOML file."),
    ]


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where samples are that a model is judged on."""
    decorators: list[Decorator] = [
        click.option("--data", metavar="DATA", help=SOURCE_HELP),
        *_sample_options(),
        click.option("--seed", type=int, default=0, show_default=True, help="Of random samples."),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where samples are and how ranges are found."""
    decorators: list[Decorator] = [
        click.option("--calibration", metavar="DATA", help=SOURCE_HELP),
        *_sample_options(),
        click.option(
            "--observer",
            type=click.Choice(["auto", "min-max", "percentile", "mse", "entropy"]),
            default="auto",
            show_default=True,
            help="How ranges of activations are chosen; auto tries all and takes the best.",
        ),
        click.option(
            "--percentile",
            type=click.FloatRange(0, 100, min_open=True),
            default=DEFAULT_PERCENTILE,
            show_default=True,
            help="Percent of the values to keep, for that observer.",
        ),
        click.option(
            "--outlier-channels",
            type=click.IntRange(min=0),
            default=8,
            show_default=True,
            help="Channels of one activation that may stay in float at most.",
        ),
        click.option(
            "--two-terms-below",
            type=click.FloatRange(0),
            default=3.0,
            show_default=True,
            metavar="STEPS",
            help="Give an activation of a product two terms of codes where its values are "
            "typically fewer steps large; 0 is never.",
        ),
        click.option(
            "--memory-budget",
            default="2GiB",
            show_default=True,
            metavar="SIZE",
            help="What calibration may take, such as 512MiB.",
        ),
        click.option(
            "--statistics",
            type=MODEL,
            metavar="FILE",
            help="Keep what calibration saw; read it if it is there.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of random samples."),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def equalization_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how channels are equalized, which takes samples."""
    decorators: list[Decorator] = [
        click.option(
            "--equalize",
            type=click.Choice(
                ["auto", "aweq", "smoothquant", "smoothquant-searched", "awq", "cfp", "none"]
            ),
            help="Which scales move range between data and weights; auto tries all and takes one "
            "only where it helps.  [default: the recipe's, or auto]",
        ),
        click.option(
            "--equalize-alpha",
            type=click.FloatRange(0, 1),
            default=0.5,
            show_default=True,
            help="Share of the data's range that goes to the weights, for smoothquant.",
        ),
        click.option(
            "--equalize-percentile",
            type=click.FloatRange(0, 100, min_open=True),
            help="Percent of the data that its range covers, for equalizing.  [default: all]",
        ),
        click.option(
            "--equalize-insert-mul",
            type=click.Choice(["never", "norms", "always"]),
            default="norms",
            show_default=True,
            help="Where a Mul may be put in: behind norms without a weight, or anywhere.",
        ),
        click.option(
            "--equalize-check/--no-equalize-check",
            default=True,
            show_default=True,
            help="With auto: quantize the model with and without scales, and undo those that its "
            "outputs gain nothing by.",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def reconstruction_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how codes of weights are chosen."""
    decorators: list[Decorator] = [
        click.option(
            "--correct-bias/--no-correct-bias",
            default=None,
            help="Take the mean error of output channels out of biases; takes samples.  "
            "[default: the recipe's]",
        ),
        click.option(
            "--reconstruct",
            type=click.Choice(["none", "gptq", "cbq"]),
            default="none",
            show_default=True,
            help="How codes of weights are chosen; gptq and cbq take samples and PyTorch.",
        ),
        click.option(
            "--reconstruct-preset",
            type=click.Choice(["fast", "default", "best"]),
            default="default",
            show_default=True,
            help="How long cbq learns; fast learns step sizes only.",
        ),
        click.option(
            "--window", type=click.IntRange(min=1), help="Blocks in a window.  [default: 2]"
        ),
        click.option(
            "--overlap",
            type=click.IntRange(min=0),
            help="Blocks that two windows share.  [default: 1]",
        ),
        click.option("--steps", type=click.IntRange(min=1), help="Steps in a window."),
        click.option(
            "--calls-per-step",
            type=click.IntRange(min=1),
            help="Calls that cbq learns from in a step; processes of torchrun share them.  "
            "[default: 1]",
        ),
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            metavar="D",
            help="Where PyTorch computes: cpu, cuda, cuda:1.",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def blocks_of(values: dict[str, Any]) -> "BlockReconstruction":
    """Take what cbq learns out of a command's values: a preset, and what was said beside it."""
    from dataclasses import replace

    from qcompiler.quant.reconstruction import PRESETS, Preset

    blocks = PRESETS[Preset(values.pop("reconstruct_preset"))]
    said = {name: values.pop(name) for name in ("window", "overlap", "steps")}
    said["batch"] = values.pop("calls_per_step")
    if said["window"] is not None and said["overlap"] is None:
        said["overlap"] = min(blocks.overlap, said["window"] - 1)
    return replace(blocks, **{name: value for name, value in said.items() if value is not None})


def equalization_of(values: dict[str, Any]) -> "EqualizationOptions | None":
    """Take the values of `equalization_options` out of a command's; None leaves it to the recipe.

    Raises:
        UsageError: A value belongs to a method that was not asked for.
    """
    from qcompiler.options import EqualizationOptions
    from qcompiler.quant.equalization import EqualizationMethod, InsertMul

    method = values.pop("equalize")
    alpha = values.pop("equalize_alpha")
    percentile = values.pop("equalize_percentile")
    insert_mul = InsertMul(values.pop("equalize_insert_mul"))
    check = values.pop("equalize_check")
    if method is None and percentile is None and insert_mul is InsertMul.NORMS and check:
        return None
    chosen = None if method == "none" else EqualizationMethod(method or "auto")
    return EqualizationOptions(chosen, alpha, percentile, insert_mul, check)


def latency_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say whether and how latency is measured."""
    decorators: list[Decorator] = [
        click.option(
            "--never-slower/--no-never-slower",
            default=None,
            help="Measure each integer region, and change those that lose to float.  "
            "[default: with samples]",
        ),
        click.option(
            "--measurements",
            type=MODEL,
            metavar="FILE",
            help="Keep what was measured; use what is there already.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            help="Threads of an op while measuring.  [default: the runtime's own]",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def samples_of(values: dict[str, Any]) -> "SampleOptions":
    """Return how samples are read, by the values of a command."""
    from qcompiler.calibration.calls import SampleOptions

    return SampleOptions(**{name: values[name] for name in _SAMPLES})


def calibration_of(values: dict[str, Any]) -> "CalibrationOptions | None":
    """Take the values of `calibration_options` out of a command's, and make one object of them.

    Raises:
        UsageError: A value cannot be used, or belongs to samples and there are none.
    """
    from qcompiler.calibration.observers import Observer
    from qcompiler.options import CalibrationOptions

    taken = {name: values.pop(name) for name in _CALIBRATION}
    budget = parse_size(taken["memory_budget"])
    if taken["calibration"] is None:
        return None
    return CalibrationOptions(
        source=taken["calibration"],
        samples=samples_of(taken),
        observer=None if taken["observer"] == "auto" else Observer(taken["observer"]),
        percentile=taken["percentile"],
        outlier_channels=taken["outlier_channels"],
        two_terms_below=taken["two_terms_below"],
        memory_budget=budget,
        statistics=taken["statistics"],
    )
