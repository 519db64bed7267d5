"""Options that several commands share."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.errors import UsageError

if TYPE_CHECKING:
    from qcompiler.calibration.calls import SampleOptions
    from qcompiler.options import CalibrationOptions, EqualizationOptions, TaskOptions
    from qcompiler.quant.islands import IslandRequest

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
    *("observer", "percentile", "outlier_channels", "memory_budget", "statistics", "seed"),
)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that decide which site gets which scheme."""
    decorators: list[Decorator] = [
        click.option("--scheme", metavar="S", help="Scheme of every site; see --list schemes."),
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


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where samples are and how ranges are found."""
    decorators: list[Decorator] = [
        click.option("--calibration", metavar="DATA", help=SOURCE_HELP),
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
                ["auto", "aweq", "smoothquant", "smoothquant-searched", "awq", "none"]
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
            type=click.Choice(["none", "gptq"]),
            default="none",
            show_default=True,
            help="How codes of weights are chosen; gptq takes samples and PyTorch.",
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


def island_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which parts of weights keep more bits, and for what task."""
    decorators: list[Decorator] = [
        click.option(
            "--islands",
            type=click.Choice(["tacq", "qal", "msg", "gradient", "magnitude", "random", "none"]),
            help="Keep more bits of what a task depends on, chosen by this; takes samples and "
            "PyTorch.  [default: the recipe's]",
        ),
        click.option(
            "--island-kind",
            type=click.Choice(["weight", "column", "block", "node"]),
            default="column",
            show_default=True,
            help="What an island is: single weights, input channels, blocks of these, or a whole "
            "weight.",
        ),
        click.option("--average-bits", type=float, metavar="B", help="Of a weight, with islands."),
        click.option("--budget-bytes", metavar="SIZE", help="The same in bytes, such as 90MB."),
        click.option("--island-fraction", type=float, metavar="P", help="Of weights in islands."),
        click.option(
            "--island-unit",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Take input channels so many at a time.",
        ),
        click.option(
            "--task",
            metavar="DATA",
            help="What the model is to be good at: .jsonl with prompt and answer, texts, .npz with "
            "labels, or a loss MODULE:FUNCTION.  [default: what it returns on --calibration]",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def islands_of(values: dict[str, Any]) -> "IslandRequest | None":
    """Take the values of `island_options` but the task out of a command's.

    Raises:
        UsageError: There is not exactly one budget.
    """
    from qcompiler.quant.islands import IslandBudget, IslandKind, IslandRequest, Saliency

    saliency, kind = values.pop("islands"), IslandKind(values.pop("island_kind"))
    size, unit = values.pop("budget_bytes"), values.pop("island_unit")
    bits, fraction = values.pop("average_bits"), values.pop("island_fraction")
    if saliency in (None, "none"):
        if any(each is not None for each in (size, bits, fraction)):
            message = "a budget for islands was given, and nothing says how they are chosen"
            raise UsageError(message, hint="add --islands tacq")
        return None
    nbytes = None if size is None else parse_size(size)
    return IslandRequest(Saliency(saliency), IslandBudget(bits, nbytes, fraction), kind, unit)


def task_of(values: dict[str, Any]) -> "TaskOptions | None":
    """Take the task out of a command's values; those of `calibration_options` say how to read it.

    Raises:
        UsageError: The memory budget is no size.
    """
    from qcompiler.options import TaskOptions

    source = values.pop("task")
    if source is None:
        return None
    return TaskOptions(source, _sample_options(values), parse_size(values["memory_budget"]))


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
    if method is None and percentile is None and insert_mul is InsertMul.NORMS:
        return None
    chosen = None if method == "none" else EqualizationMethod(method or "auto")
    return EqualizationOptions(chosen, alpha, percentile, insert_mul)


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
        samples=_sample_options(taken),
        observer=None if taken["observer"] == "auto" else Observer(taken["observer"]),
        percentile=taken["percentile"],
        outlier_channels=taken["outlier_channels"],
        memory_budget=budget,
        statistics=taken["statistics"],
    )


def _sample_options(values: dict[str, Any]) -> "SampleOptions":
    from qcompiler.calibration.calls import SampleOptions

    names = ("max_samples", "batch_size", "seed", "tokenizer", "sequence_length", "max_tokens")
    return SampleOptions(**{name: values[name] for name in (*names, "text_field", "image_spec")})


def parse_size(text: str) -> int:
    """Read a number of bytes such as "512MiB", "2GB" or "1000000".

    Raises:
        UsageError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        message = f"{text!r} is no size"
        raise UsageError(message, hint="write it like 512MiB or 2GB")
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper() or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)
