"""`qcompile explain OUT NODE`: what became of a node, and why."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qcompiler.cli.options import MODEL

if TYPE_CHECKING:
    from qcompiler.report.explanation import Subject


@click.command("explain")
@click.argument("model", type=MODEL, required=False)
@click.argument("node", required=False)
@click.option(
    "--reason", metavar="RULE", help="Say what a rule or an error means, and the way out."
)
def command(model: Path | None, node: str | None, reason: str | None) -> None:
    """Say what NODE became in the compiled MODEL: why, at which cost, and what would change it.

    NODE is a name in the source or in MODEL, a glob, or /regex/. Reads the report beside the model
    if there is one.
    """
    from qcompiler.errors import UsageError, printable
    from qcompiler.quant.selector import nearest
    from qcompiler.report.explanation import explanations

    if reason is not None:
        for line in _meaning(reason):
            click.echo(line)
        return
    if model is None or node is None:
        message = "a compiled model and the name of a node are needed"
        raise UsageError(
            message, hint="qcompile explain OUT NODE, or qcompile explain --reason RULE"
        )
    subject = _subject(model)
    found = False
    for lines in explanations(subject, node):
        found = True
        for line in lines:
            click.echo(printable(line))
    if not found:
        close = nearest(node.strip("*/"), subject.names())
        message = f"no node is called {node!r}"
        hint = f"nearest: {', '.join(close)}" if close else "`qcompile inspect` lists the names"
        raise UsageError(message, where=str(model), hint=hint)


def _meaning(reason: str) -> list[str]:
    from qcompiler.errors import UsageError
    from qcompiler.quant.selector import nearest
    from qcompiler.report.refusals import catalogue

    entry = catalogue().get(reason)
    if entry is None:
        message = f"nothing is known of the reason {reason!r}"
        close = ", ".join(nearest(reason, list(catalogue())))
        raise UsageError(message, hint=f"nearest: {close or 'none'}; docs/refusals.md has all")
    return [entry.reason, f"  {entry.meaning}", f"  way out: {entry.way_out}"]


def _subject(model: Path) -> "Subject":
    from qcompiler.ir.load import load_model
    from qcompiler.report.build import node_reports
    from qcompiler.report.explanation import Subject
    from qcompiler.report.files import read_report

    report_path = model.with_suffix(".report.json")
    compiled = load_model(model)
    if report_path.exists():
        report = read_report(report_path)
        return Subject(compiled, report.nodes, report.passes, report.engine)
    return Subject(compiled, node_reports(compiled, None))
