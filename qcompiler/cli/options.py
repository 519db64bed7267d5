"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

MODEL = click.Path(path_type=Path)

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
