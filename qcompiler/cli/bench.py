"""`qcompile bench MODEL...`: how fast models and engines are, and how near to the first."""

from pathlib import Path
from typing import Any

import click

from qcompiler.cli.options import (
    MODEL,
    custom_ops_option,
    data_options,
    report_option,
    samples_of,
)


@click.command("bench")
@click.argument("models", type=MODEL, nargs=-1, required=True)
@data_options
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Time for the models of each runtime together.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of an op in ONNX Runtime.  [default: its own]",
)
@custom_ops_option
@report_option
def command(
    models: tuple[Path, ...],
    data: str | None,
    seconds: float,
    threads: int | None,
    custom_ops: tuple[Path, ...],
    report: str,
    **others: Any,
) -> None:
    """Time MODELS in turns, and compare their outputs with those of the first.

    Each is an ONNX model, which ONNX Runtime runs on the CPU, or an engine (.engine, .plan), which
    takes its library, PyTorch and the GPU it was built for. The first is an ONNX model. Without
    --data inputs are random.
    """
    from qcompiler.bench import BenchOptions, bench, bench_lines
    from qcompiler.cli.progress import terminal_progress
    from qcompiler.errors import printable

    options = BenchOptions(samples_of(others), seconds, threads, custom_ops)
    with terminal_progress() as progress:
        found = bench(models, data or "random:4", options, progress=progress)
    if report == "json":
        click.echo(found.to_json(), nl=False)
        return
    for line in bench_lines(found):
        click.echo(printable(line))
