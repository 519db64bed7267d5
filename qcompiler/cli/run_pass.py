"""`qcompile run-pass NAME`: one pass alone, like `mlir-opt`."""

import tempfile
from pathlib import Path
from typing import Any

import click

from qcompiler.cli.options import (
    MODEL,
    blocks_of,
    calibration_of,
    calibration_options,
    equalization_of,
    equalization_options,
    plan_options,
    reconstruction_options,
)


@click.command("run-pass")
@click.argument("name")
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=MODEL, required=True, help="Where the model goes.")
@plan_options
@calibration_options
@equalization_options
@reconstruction_options
def command(
    name: str,
    model: Path,
    output: Path,
    recipe: Path | None,
    **others: Any,
) -> None:
    """Run the pass NAME over MODEL, verify what it made, and write it to OUTPUT."""
    from qcompiler.cli.progress import terminal_progress
    from qcompiler.ir.fingerprint import fingerprint
    from qcompiler.ir.load import load_model
    from qcompiler.ir.save import save_model
    from qcompiler.ir.weights import WeightStore
    from qcompiler.options import CompileOptions, Reconstruction
    from qcompiler.pipeline import pass_named
    from qcompiler.plan import make_plan, with_data
    from qcompiler.rewriting.base import PassContext
    from qcompiler.rewriting.manager import PassManager

    calibration = calibration_of(others)
    options = CompileOptions(
        recipe=recipe,
        calibration=calibration,
        equalization=equalization_of(others),
        reconstruct=Reconstruction(others.pop("reconstruct")),
        blocks=blocks_of(others),
        **others,
    )
    graph = load_model(model)
    plan = with_data(make_plan(options), graph, lambda: fingerprint(model))
    rewrite = pass_named(name, plan)
    with (
        terminal_progress() as progress,
        tempfile.TemporaryDirectory(prefix="qcompiler-") as scratch,
        WeightStore(Path(scratch)) as store,
    ):
        (record,) = PassManager(PassContext(store, progress)).run(graph, [rewrite])
        save_model(graph, output, progress=progress)
    click.echo(f"{record.name}: {len(record.rewrites)} rewrites, {record.seconds:.2f} s")
    for change in record.rewrites:
        click.echo(f"  {change.rule}  {change.node}  {change.detail}".rstrip())
    for skip in record.skips:
        click.echo(f"  not {skip.rule}  {skip.node}: {skip.reason}")
