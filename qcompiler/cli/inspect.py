"""`qcompile inspect MODEL`: what is in a model that could be quantized."""

import json
from pathlib import Path

import click

from qcompiler.cli.options import MODEL


@click.command("inspect")
@click.argument("model", type=MODEL)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(model: Path, as_json: bool) -> None:
    """List MODEL's ops, its quantizable sites with their weights, and its blocks."""
    from qcompiler.report.inspection import inspect_model
    from qcompiler.report.terminal import print_inspection

    found = inspect_model(model)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_inspection(found)
