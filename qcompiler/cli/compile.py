"""`qcompile MODEL`: compile a model and show what was done."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.cli.engine import engine_options, engine_options_of
from qcompiler.cli.gate_options import gate_options, publish_verdict
from qcompiler.cli.island_options import island_options, islands_of, task_of
from qcompiler.cli.options import (
    MODEL,
    blocks_of,
    calibration_of,
    calibration_options,
    custom_ops_option,
    equalization_of,
    equalization_options,
    latency_options,
    plan_options,
    reconstruction_options,
    report_option,
    samples_of,
)
from qcompiler.cli.search_options import search_of, search_options

if TYPE_CHECKING:
    from qcompiler.artefacts import CompileResult
    from qcompiler.options import CompileOptions
    from qcompiler.progress import Progress
    from qcompiler.search import SearchRequest
    from qcompiler.team import Team


@click.command("compile")
@click.argument("model", type=MODEL)
@click.option(
    "-o",
    "--output",
    type=MODEL,
    help="Where the model goes; NAME.qbundle is a folder for a device.  [default: beside MODEL]",
)
@plan_options
@calibration_options
@equalization_options
@reconstruction_options
@island_options
@latency_options
@engine_options
@click.option(
    "--back-off/--no-back-off",
    default=True,
    show_default=True,
    help="Where no engine can be built, look for the fewest ops to leave in float.",
)
@click.option(
    "--min-output-sqnr",
    type=float,
    metavar="DB",
    help="Let sensitive ops fall back from w8a8 to w8a16 until the outputs have so many dB.",
)
@click.option(
    "--metric", metavar="MODULE:FUNCTION", help="The same by a measure of yours, higher is better."
)
@click.option("--max-metric-drop", type=float, help="What --metric may lose against float.")
@search_options
@gate_options
@click.option(
    "--verify",
    type=click.Choice(["structure", "numerics"]),
    default="structure",
    show_default=True,
    help="What is checked after every pass; numerics also runs the model.",
)
@click.option(
    "--samples", type=MODEL, metavar="NPZ", help="Inputs for --verify numerics; made up if absent."
)
@click.option("--dump-ir", type=MODEL, metavar="DIR", help="Write the model after every pass.")
@click.option(
    "--work-dir",
    type=MODEL,
    metavar="DIR",
    help="Keep unfinished work there; the same command goes on where it was stopped.",
)
@report_option
@click.option(
    "--html/--no-html", default=True, show_default=True, help="Write the report as a page, too."
)
@custom_ops_option
@click.option(
    "--external-data/--no-external-data",
    default=None,
    help="Weights in a file of their own.  [default: above 128 MiB]",
)
@click.option(
    "--inspect/--no-inspect",
    "inspect_kernels",
    default=True,
    show_default=True,
    help="Load the result in the runtime and report the kernels it chooses.",
)
@click.option(
    "--compare/--no-compare",
    default=True,
    show_default=True,
    help="Compare the result with MODEL on the samples, for the report.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: processors]")
def command(
    model: Path,
    output: Path | None,
    report: str,
    recipe: Path | None,
    verify: str,
    custom_ops: tuple[Path, ...],
    back_off: bool,
    gate: tuple[str, ...],
    junit: Path | None,
    json: Path | None,
    markdown: Path | None,
    **others: Any,
) -> None:
    """Compile MODEL: quantize its weights and write OUT, OUT's report and its manifest."""
    from qcompiler.bounds import gate_from_texts
    from qcompiler.cli.processes import leading_team
    from qcompiler.cli.progress import terminal_progress
    from qcompiler.errors import printable
    from qcompiler.options import CompileOptions, Reconstruction, Verification
    from qcompiler.report.files import report_json
    from qcompiler.report.terminal import print_report
    from qcompiler.report.verdict import GateFailedError

    publish = partial(
        publish_verdict, junit=junit, json=json, markdown=markdown, err=report == "json"
    )
    gate_samples = samples_of(others)
    seed = others["seed"]
    search, task = search_of(others), task_of(others)
    calibration = calibration_of(others)
    options = CompileOptions(
        recipe=recipe,
        calibration=calibration,
        equalization=equalization_of(others),
        islands=islands_of(others) if search is None else None,
        task=task,
        reconstruct=Reconstruction(others.pop("reconstruct")),
        engine_options=engine_options_of(others),
        blocks=blocks_of(others),
        seed=seed,
        verify=Verification(verify),
        custom_op_libraries=custom_ops,
        gate=gate_from_texts(gate),
        gate_samples=gate_samples,
        **others,
    )
    try:
        with leading_team(model, options) as team:
            if team is None:
                return
            with terminal_progress() as progress:
                result, no_script = _compile(
                    model, options, output, search, progress, team, back_off=back_off
                )
    except GateFailedError as failure:
        publish(failure.verdict)
        raise
    if result.verdict is not None:
        publish(result.verdict)
    if report == "json":
        click.echo(report_json(result.report), nl=False)
        return
    print_report(result.report, result.path)
    if result.page_path is not None:
        click.echo(f"wrote {printable(str(result.page_path))}, the report as a page")
    if no_script is not None:
        click.echo(printable(f"no build.sh: {no_script}; use `qcompile build {output}`"))
    if options.scheme is None and options.recipe is None and calibration is None:
        click.echo(
            "No scheme was asked for, so weights went to int8 and activations stayed in float: "
            "the safest saving without data. With --calibration DATA, activations go to int8 as "
            "well, which is faster."
        )


def _compile(
    model: Path,
    options: "CompileOptions",
    output: Path | None,
    search: "SearchRequest | None",
    progress: "Progress",
    team: "Team",
    *,
    back_off: bool,
) -> tuple["CompileResult", str | None]:
    """Compile into a model or a bundle; returns as well why a bundle has no script."""
    from qcompiler.back_off import compile_backing_off
    from qcompiler.bundle import compile_bundle, is_bundle_name
    from qcompiler.compile import compile_model
    from qcompiler.errors import UsageError

    if search is not None:
        from qcompiler.search import compile_searching

        if team.size > 1:
            message = "a search is made by one process"
            hint = "search with one process, then compile its recipe with several"
            raise UsageError(message, where="--search", hint=hint)
        return compile_searching(model, options, search, output=output, progress=progress), None
    if output is not None and is_bundle_name(output):
        if team.size > 1:
            message = "a bundle is made by one process"
            hint = "write a .onnx file with several processes, or the bundle with one"
            raise UsageError(message, where=str(output), hint=hint)
        bundle = compile_bundle(model, options, output, back_off=back_off, progress=progress)
        return bundle.model, bundle.no_script
    if back_off and team.size == 1:
        return compile_backing_off(model, options, output=output, progress=progress), None
    return compile_model(model, options, output=output, progress=progress, team=team), None
