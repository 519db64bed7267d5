"""`qcompile sensitivity MODEL`: which ops a quantization should spare."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
    from qcompiler.sensitivity import Sensitivity


@click.command("sensitivity")
@click.argument("model", type=MODEL)
@plan_options
@calibration_options
@equalization_options
@click.option(
    "--mode",
    type=click.Choice(["local", "exact"]),
    default="local",
    show_default=True,
    help="Look at values a few blocks behind an op, or at the outputs.",
)
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="The worst N only.")
@click.option(
    "--min-output-sqnr",
    type=float,
    metavar="DB",
    help="As many of the worst as adding up damage says are too many for so many dB.",
)
@click.option("-o", "--output", type=MODEL, help="Write a recipe that spares these ops.")
@report_option
@custom_ops_option
def command(
    model: Path,
    recipe: Path | None,
    mode: str,
    top: int | None,
    min_output_sqnr: float | None,
    output: Path | None,
    report: str,
    custom_ops: tuple[Path, ...],
    **others: Any,
) -> None:
    """Rank the ops of MODEL by what quantizing each alone does to its outputs."""
    from qcompiler.cli.progress import terminal_progress
    from qcompiler.errors import UsageError
    from qcompiler.options import CompileOptions
    from qcompiler.sensitivity import Mode, rank_sensitivity

    if top is not None and min_output_sqnr is not None:
        message = "--top and --min-output-sqnr both say how many ops are spared"
        raise UsageError(message, hint="give one of them")
    if output is not None and top is None and min_output_sqnr is None:
        message = "the recipe needs to know how many ops to spare"
        raise UsageError(message, where=str(output), hint="give --top N or --min-output-sqnr DB")
    options = CompileOptions(
        recipe=recipe,
        calibration=calibration_of(others),
        equalization=equalization_of(others),
        custom_op_libraries=custom_ops,
        **others,
    )
    with terminal_progress() as progress:
        found = rank_sensitivity(model, options, Mode(mode), progress=progress)
    count = top if min_output_sqnr is None else found.needed_for(min_output_sqnr)
    if output is not None:
        _write(output, found.sparing(count or 0).to_toml())
    if report == "json":
        click.echo(found.to_json(count), nl=False)
        return
    _print_table(found, count)
    if output is not None:
        click.echo(f"{output}: a recipe that spares {count} of {len(found.rows)} ops")


def _write(path: Path, text: str) -> None:
    from qcompiler.ir.atomic_file import AtomicFile
    from qcompiler.ir.weights import disk_errors

    with disk_errors(path.parent), AtomicFile(path) as file:
        file.stream().write(text.encode())
        file.commit()


def _print_table(found: "Sensitivity", count: int | None) -> None:
    from qcompiler.errors import printable

    rows = found.rows[:count]
    names = [", ".join(row.nodes) for row in rows]
    wide = max([4, *(len(name) for name in names)])
    click.echo(f"{'rank':>4}  {'node':{wide}}  {'op':12}  {'scheme':12}  {'dB':>6}  share  KL")
    for rank, (row, name) in enumerate(zip(rows, names, strict=True), start=1):
        divergence = "" if row.damage.divergence is None else f"{row.damage.divergence:.2e}"
        line = (
            f"{rank:4}  {name:{wide}}  {row.op_type:12}  {row.scheme:12}  "
            f"{row.damage.sqnr_db:6.1f}  {row.share:5.1%}  {divergence}"
        )
        click.echo(printable(line.rstrip()))
    where = "at the outputs" if found.mode.value == "exact" else "a few blocks behind the op"
    click.echo(
        f"each op alone, {where}; {found.samples}; all {len(found.rows)} together, if errors add "
        f"up: {found.sum_db:.1f} dB"
    )
