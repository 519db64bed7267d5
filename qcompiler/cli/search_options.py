"""Options of a search over schemes and islands."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qcompiler.byte_sizes import parse_size
from qcompiler.errors import UsageError

if TYPE_CHECKING:
    from qcompiler.search import SearchRequest


def search_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that ask for a search, and for a bound on latency."""
    decorators: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option(
            "--search",
            is_flag=True,
            help="Try several schemes (--scheme takes a list) and islands, and write the smallest "
            "that holds all of --min-output-sqnr, --max-metric-drop, --max-latency-ratio and "
            "--average-bits or --budget-bytes.",
        ),
        click.option(
            "--max-latency-ratio",
            type=float,
            metavar="R",
            help="With it, times the float model's latency at most.",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def search_of(values: dict[str, Any]) -> "SearchRequest | None":
    """Take what a search is asked for out of a command's values; None without a search.

    Without one the values of `island_options` stay, with one they are taken as well.

    Raises:
        UsageError: Options that do not go with a search, or that need one.
    """
    searching, ratio = values.pop("search"), values.pop("max_latency_ratio")
    if not searching:
        if ratio is not None:
            message = "a bound on latency chooses among compilations, and one alone was asked for"
            hint = "add --search, or --gate max-latency=R to judge this one"
            raise UsageError(message, where="--max-latency-ratio", hint=hint)
        return None
    from qcompiler.quant.islands import Saliency
    from qcompiler.search import SearchRequest
    from qcompiler.search.request import DEFAULT_SCHEMES

    saliency, kind = values.pop("islands") or "tacq", values.pop("island_kind")
    fraction, size = values.pop("island_fraction"), values.pop("budget_bytes")
    if fraction is not None or kind is not None:
        option = "--island-kind" if fraction is None else "--island-fraction"
        message = "a search tries input channels and whole weights, within bits or bytes"
        raise UsageError(message, where=option, hint="leave it out")
    scheme = values.pop("scheme")
    values["scheme"] = None
    return SearchRequest(
        DEFAULT_SCHEMES if scheme is None else tuple(scheme.split(",")),
        None if saliency == "none" else Saliency(saliency),
        values.pop("average_bits"),
        None if size is None else parse_size(size),
        ratio,
        values.pop("island_unit"),
    )
