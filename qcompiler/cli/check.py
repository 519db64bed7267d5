"""`qcompile check BASE CANDIDATE`: may this model be released?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from qcompiler.cli.gate_options import gate_options, publish_verdict
from qcompiler.cli.options import (
    MODEL,
    custom_ops_option,
    data_options,
    samples_of,
)


@click.command("check")
@click.argument("base", type=MODEL)
@click.argument("candidate", type=MODEL)
@data_options
@gate_options
@click.option(
    "--manifest", type=MODEL, metavar="FILE", help="Of the candidate.  [default: beside it]"
)
@click.option(
    "--baseline",
    type=MODEL,
    metavar="FILE",
    help="No worse than this release: its manifest, or what --json wrote.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of an op while measuring.  [default: the runtime's own]",
)
@custom_ops_option
def command(
    base: Path,
    candidate: Path,
    data: str | None,
    gate: tuple[str, ...],
    junit: Path | None,
    json: Path | None,
    markdown: Path | None,
    manifest: Path | None,
    baseline: Path | None,
    threads: int | None,
    custom_ops: tuple[Path, ...],
    **others: Any,
) -> int:
    """Hold CANDIDATE, made of the float model BASE, against bounds.

    Exits with 0 where all hold and with 5 where one does not, and names what may be to blame.
    """
    from qcompiler.bounds import Gate, gate_from_texts
    from qcompiler.cli.progress import terminal_progress
    from qcompiler.errors import ParityError
    from qcompiler.gate.check import run_gate
    from qcompiler.gate.setting import GateOptions, candidate_at

    texts = [*gate, *([] if baseline is None else [f"baseline={baseline}"])]
    bounds = gate_from_texts(texts) or Gate()
    if data is not None:
        bounds = replace(bounds, data=data)
    options = GateOptions(samples_of(others), threads, custom_ops)
    with terminal_progress() as progress:
        verdict = run_gate(
            base, candidate_at(candidate, manifest), bounds, options, progress=progress
        )
    publish_verdict(verdict, junit=junit, json=json, markdown=markdown)
    return 0 if verdict.passed else ParityError.exit_code
