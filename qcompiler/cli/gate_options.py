"""The options of gates, and where their verdicts go."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.cli.options import MODEL, Decorator

if TYPE_CHECKING:
    from qcompiler.report.verdict import Verdict


def gate_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what a model must keep, and where the verdict goes."""
    decorators: list[Decorator] = [
        click.option(
            "--gate",
            "gate",
            multiple=True,
            metavar="BOUND",
            help="What the result must keep, such as min-sqnr=20 or max-latency=0.9, or a TOML "
            "file with a [gate] table. Repeatable.",
        ),
        click.option("--junit", type=MODEL, metavar="FILE", help="Write the verdict as JUnit XML."),
        click.option("--json", type=MODEL, metavar="FILE", help="Write the verdict as JSON."),
        click.option(
            "--markdown", type=MODEL, metavar="FILE", help="Write the verdict as Markdown."
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def publish_verdict(
    verdict: "Verdict",
    *,
    junit: Path | None,
    json: Path | None,
    markdown: Path | None,
    err: bool = False,
) -> None:
    """Write a verdict to the files asked for, and where GitHub Actions looks for it.

    Args:
        verdict: The verdict.
        junit: Where it goes as JUnit XML.
        json: Where it goes as JSON.
        markdown: Where it goes as Markdown.
        err: Whether people read it on standard error, since the output is for programs.

    Raises:
        UsageError: A file cannot be written.
    """
    from qcompiler.report import gate_files
    from qcompiler.report.verdict import verdict_json

    for path, text in (
        (junit, gate_files.junit_xml),
        (json, verdict_json),
        (markdown, gate_files.markdown),
    ):
        if path is not None:
            _write(path, text(verdict))
    for line in gate_files.terminal_lines(verdict):
        click.echo(line, err=err)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        _append(Path(summary), gate_files.markdown(verdict))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in gate_files.annotations(verdict):
            click.echo(line, err=err)


def _write(path: Path, text: str) -> None:
    from qcompiler.ir.atomic_file import AtomicFile
    from qcompiler.ir.weights import disk_errors

    with disk_errors(path.absolute().parent), AtomicFile(path) as file:
        file.stream().write(text.encode())
        file.commit()


def _append(path: Path, text: str) -> None:
    from qcompiler.ir.weights import disk_errors

    with disk_errors(path.absolute().parent), path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
