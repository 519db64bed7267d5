"""`qcompile explain OUT NODE`: what a node got, and why."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qcompiler.cli.options import MODEL

if TYPE_CHECKING:
    from qcompiler.report.records import NodeReport, PassReport


@click.command("explain")
@click.argument("model", type=MODEL)
@click.argument("node")
def command(model: Path, node: str) -> None:
    """Say what NODE of the compiled MODEL got, which rule decided, and what runs there.

    NODE is a name, a glob, or /regex/. Reads the report beside the model if there is one.
    """
    from qcompiler.errors import UsageError, printable
    from qcompiler.quant.selector import Selector, nearest
    from qcompiler.report.terminal import explanation

    nodes, passes = _facts(model)
    selector = Selector(name=node)
    chosen = [
        entry for entry in nodes if any(selector.matches_name(name) for name in entry.origins)
    ]
    if not chosen:
        close = nearest(node.strip("*/"), [name for entry in nodes for name in entry.origins])
        message = f"no quantizable node is called {node!r}"
        hint = f"nearest: {', '.join(close)}" if close else "`qcompile inspect` lists the names"
        raise UsageError(message, where=str(model), hint=hint)
    for entry in chosen:
        for line in explanation(entry, passes):
            click.echo(printable(line))


def _facts(model: Path) -> "tuple[tuple[NodeReport, ...], tuple[PassReport, ...]]":
    from qcompiler.ir.load import load_model
    from qcompiler.report.build import node_reports
    from qcompiler.report.files import read_report

    report_path = model.with_suffix(".report.json")
    if report_path.exists():
        report = read_report(report_path)
        return report.nodes, report.passes
    return node_reports(load_model(model), None), ()
