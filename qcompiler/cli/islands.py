"""`qcompile islands MODEL`: which weights a task depends on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.cli.island_options import island_options, islands_of, task_of
from qcompiler.cli.options import (
    MODEL,
    calibration_of,
    calibration_options,
    custom_ops_option,
    equalization_of,
    equalization_options,
    plan_options,
    report_option,
)

if TYPE_CHECKING:
    from qcompiler.report.records import IslandsReport


@click.command("islands")
@click.argument("model", type=MODEL)
@plan_options
@calibration_options
@equalization_options
@island_options
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="D",
    help="Where PyTorch computes: cpu, cuda, cuda:1.",
)
@report_option
@custom_ops_option
def command(
    model: Path,
    recipe: Path | None,
    report: str,
    custom_ops: tuple[Path, ...],
    **others: Any,
) -> None:
    """Show where in MODEL the weights lie that a task depends on; nothing is written."""
    from dataclasses import asdict

    from qcompiler.cli.progress import terminal_progress
    from qcompiler.island_map import map_islands
    from qcompiler.options import CompileOptions

    task = task_of(others)
    options = CompileOptions(
        recipe=recipe,
        calibration=calibration_of(others),
        equalization=equalization_of(others),
        islands=islands_of(others),
        task=task,
        custom_op_libraries=custom_ops,
        **others,
    )
    with terminal_progress() as progress:
        found = map_islands(model, options, progress=progress)
    if report == "json":
        click.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
        return
    _print(found)


def _print(found: "IslandsReport") -> None:
    """Print layers down and projections across: saliency, and what islands hold."""
    from qcompiler.errors import printable
    from qcompiler.report.islands import island_grid
    from qcompiler.report.terminal import island_lines

    grid = island_grid(found)
    wide = [max(len(name), len("100.0% 100.0%")) for name in grid.projections]
    click.echo("share of all saliency, and the part of the weight in islands")
    header = (name.rjust(size) for name, size in zip(grid.projections, wide, strict=True))
    click.echo(printable(f"layer  {'  '.join(header)}"))
    for layer, row in zip(grid.layers, grid.rows, strict=True):
        texts = (f"{cell.saliency:.1%} {cell.island_part:.2%}" if cell else "" for cell in row)
        cells = (text.rjust(size) for text, size in zip(texts, wide, strict=True))
        click.echo(f"{layer:5}  {'  '.join(cells)}".rstrip())
    for line in island_lines(found):
        click.echo(printable(line))
