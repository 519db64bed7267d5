"""`qcompile build BUNDLE`: builds the engine of an edge bundle on this machine."""

from pathlib import Path

import click

from qcompiler.byte_sizes import parse_size
from qcompiler.cli.options import MODEL


@click.command("build")
@click.argument("bundle", type=MODEL)
@click.option(
    "-o",
    "--output",
    type=MODEL,
    metavar="FILE",
    help="Where the engine goes.  [default: BUNDLE/device.engine]",
)
@click.option("--timing-cache", type=MODEL, metavar="FILE", help="Timings to keep and to reuse.")
@click.option("--builder-memory", metavar="SIZE", help="End the building process beyond so much.")
@click.option(
    "--builder-python",
    type=MODEL,
    metavar="FILE",
    help="An interpreter that has the library.  [default: this one]",
)
def command(
    bundle: Path,
    output: Path | None,
    timing_cache: Path | None,
    builder_memory: str | None,
    builder_python: Path | None,
) -> None:
    """Build the engine of BUNDLE here: the same as its build.sh, through Python.

    Files are compared with their hashes first. Exits with 2 where the library is missing or BUNDLE
    is none, with 3 where a file has changed, with 4 where the library cannot build it.
    """
    from qcompiler.bundle import build_bundle
    from qcompiler.cli.progress import terminal_progress
    from qcompiler.engine import engine_warnings
    from qcompiler.errors import printable
    from qcompiler.report.terminal import engine_lines

    with terminal_progress() as progress:
        built = build_bundle(
            bundle,
            output,
            timing_cache=timing_cache,
            memory_limit=None if builder_memory is None else parse_size(builder_memory),
            python=builder_python,
            progress=progress,
        )
    for line in engine_lines(built.report):
        click.echo(printable(line))
    for warning in engine_warnings(built.report):
        click.echo(printable(f"warning: {warning}"))
    click.echo(printable(f"wrote {built.path}"))
