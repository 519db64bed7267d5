"""`qcompile report REPORT`: a report as a page for a browser."""

from pathlib import Path

import click

from qcompiler.cli.options import MODEL


@click.command("report")
@click.argument("report", type=MODEL)
@click.option("-o", "--output", type=MODEL, help="Where the page goes.  [default: beside REPORT]")
def command(report: Path, output: Path | None) -> None:
    """Write REPORT, the .report.json beside a compiled model, as one HTML file."""
    from qcompiler.ir.atomic_file import AtomicFile
    from qcompiler.ir.weights import disk_errors
    from qcompiler.report.page import page_of_file

    path = output or report.with_suffix(".html")
    text = page_of_file(report)
    with disk_errors(path.parent), AtomicFile(path) as file:
        file.stream().write(text.encode())
        file.commit()
    click.echo(f"wrote {path}")
