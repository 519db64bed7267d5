"""`qcompile reproduce MANIFEST MODEL`: does the same compilation give the same bytes?"""

from pathlib import Path

import click

from qcompiler.cli.options import (
    MODEL,
    SOURCE_HELP,
    custom_ops_option,
)

_DIFFERS = 5


@click.command("reproduce")
@click.argument("manifest", type=MODEL)
@click.argument("model", type=MODEL)
@click.option("--calibration", metavar="DATA", help=SOURCE_HELP)
@click.option("--task", metavar="DATA", help="What it was made for, if for a task.")
@click.option("--tokenizer", type=MODEL, metavar="FILE", help="tokenizer.json, for texts.")
@click.option("--image-spec", metavar="SPEC", help="size=224,mean=..., or a TOML file.")
@click.option(
    "--measurements", type=MODEL, metavar="FILE", help="Latencies that the compilation used."
)
@custom_ops_option
def command(
    manifest: Path,
    model: Path,
    calibration: str | None,
    task: str | None,
    tokenizer: Path | None,
    image_spec: str | None,
    measurements: Path | None,
    custom_ops: tuple[Path, ...],
) -> int:
    """Compile MODEL again as MANIFEST says, compare the bytes, and keep nothing.

    Exits with 0 where they are the same and with 5 where they are not, and names what changed.
    """
    from qcompiler.calibration.calls import SampleOptions
    from qcompiler.cli.progress import terminal_progress
    from qcompiler.options import CalibrationOptions, TaskOptions
    from qcompiler.reproduce import reproduce

    samples = SampleOptions(tokenizer=tokenizer, image_spec=image_spec)
    with terminal_progress() as progress:
        result = reproduce(
            manifest,
            model,
            None if calibration is None else CalibrationOptions(calibration, samples),
            task=None if task is None else TaskOptions(task, samples),
            measurements=measurements,
            custom_op_libraries=custom_ops,
            progress=progress,
        )
    verdict = "identical" if result.identical else "different"
    click.echo(f"{verdict}: sha256 {result.found} (manifest: {result.expected})")
    for difference in result.differences:
        click.echo(f"  {difference}")
    return 0 if result.identical else _DIFFERS
