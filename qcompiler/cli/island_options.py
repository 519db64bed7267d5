"""Options of the commands that choose islands."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from qcompiler.byte_sizes import parse_size
from qcompiler.cli.options import samples_of
from qcompiler.errors import UsageError

if TYPE_CHECKING:
    from qcompiler.options import TaskOptions
    from qcompiler.quant.islands import IslandRequest


_OF_GRADIENTS: Final = ("tacq", "qal", "msg", "gradient")
_OTHERS: Final = ("magnitude", "spqr", "slim", "random", "none")


def island_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which parts of weights keep more bits, and for what task."""
    decorators: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option(
            "--islands",
            type=click.Choice([*_OF_GRADIENTS, *_OTHERS]),
            help="Keep more bits of what a task depends on, chosen by this; takes samples and "
            "PyTorch.  [default: the recipe's]",
        ),
        click.option(
            "--island-kind",
            type=click.Choice(["weight", "column", "block", "node"]),
            help="What an island is: single weights, input channels, blocks of these, or a whole "
            "weight.  [default: node; column with --island-fraction]",
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

    saliency, kind = values.pop("islands"), values.pop("island_kind")
    size, unit = values.pop("budget_bytes"), values.pop("island_unit")
    bits, fraction = values.pop("average_bits"), values.pop("island_fraction")
    if saliency in (None, "none"):
        if any(each is not None for each in (size, bits, fraction)):
            message = "a budget for islands was given, and nothing says how they are chosen"
            raise UsageError(message, hint="add --islands tacq")
        return None
    nbytes = None if size is None else parse_size(size)
    budget = IslandBudget(bits, nbytes, fraction)
    kind = budget.usual_kind if kind is None else IslandKind(kind)
    return IslandRequest(Saliency(saliency), budget, kind, unit)


def task_of(values: dict[str, Any]) -> "TaskOptions | None":
    """Take the task out of a command's values; those of `calibration_options` say how to read it.

    Raises:
        UsageError: The memory budget is no size.
    """
    from qcompiler.options import TaskOptions

    source = values.pop("task")
    if source is None:
        return None
    return TaskOptions(source, samples_of(values), parse_size(values["memory_budget"]))
