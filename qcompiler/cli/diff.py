"""`qcompile diff A B`: how two artefacts differ, node by node."""

from pathlib import Path

import click

from qcompiler.cli.options import (
    MODEL,
    report_option,
)


@click.command("diff")
@click.argument("a", type=MODEL)
@click.argument("b", type=MODEL)
@report_option
def command(a: Path, b: Path, report: str) -> None:
    """Say how compiled model or report B differs from A: as a whole, and node by node.

    Exits with 0 whether they differ or not.
    """
    from qcompiler.errors import printable
    from qcompiler.report.difference import compare, difference_lines, read_artefact

    found = compare(read_artefact(a), read_artefact(b))
    if report == "json":
        click.echo(found.to_json(), nl=False)
        return
    for line in difference_lines(found):
        click.echo(printable(line))
