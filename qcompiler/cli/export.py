"""`qcompile export SOURCE`: a PyTorch module or a checkpoint as an ONNX model."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qcompiler.cli.options import MODEL

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompiler.execution.outputs import OutputDifference
    from qcompiler.export.checked_file import WrittenExport
    from qcompiler.export.exported import Exported

_SHOWN = 6


@click.command("export")
@click.argument("source")
@click.option("-o", "--output", type=MODEL, required=True, help="Where the model goes.")
@click.option("--input-names", metavar="A,B", help="Names for the inputs, in order.")
@click.option("--output-names", metavar="A,B", help="Names for the outputs, in order.")
@click.option(
    "--opset", type=click.IntRange(18, 24), default=21, show_default=True, help="Of the operators."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Type of weights and activations.  [default: float32; a function's own]",
)
@click.option(
    "--task",
    metavar="T",
    help="causal-lm, masked-lm, sequence-classification, feature-extraction, "
    "image-classification or speech-encoder.  [default: what the checkpoint is for]",
)
@click.option(
    "--no-cache",
    is_flag=True,
    help="A causal-lm without past keys and values among its inputs and outputs.",
)
@click.option(
    "--parity/--no-parity",
    default=True,
    show_default=True,
    help="Run PyTorch and the graph on the same inputs; nothing is written if they differ.",
)
def command(
    source: str,
    output: Path,
    input_names: str | None,
    output_names: str | None,
    opset: int,
    dtype: str | None,
    task: str | None,
    no_cache: bool,
    parity: bool,
) -> None:
    """Write SOURCE as an ONNX model that `qcompile` can compile.

    SOURCE is a .pt2 file of torch.export.save, MODULE:FUNCTION (returns a module, its example
    inputs and, if need be, its dynamic shapes), a folder with a checkpoint of transformers, its
    name on the hub, or a .gguf file.
    """
    from qcompiler.cli.progress import terminal_progress
    from qcompiler.export.checked_file import refuse_unwritable, write_checked
    from qcompiler.export.sources import ExportOptions, read_source

    options = ExportOptions(
        task=task,
        with_cache=False if no_cache else None,
        dtype=dtype,
        input_names=_names(input_names),
        output_names=_names(output_names),
        opset=opset,
    )
    refuse_unwritable(output)
    with terminal_progress() as progress:
        with progress.task("exporting", 1) as advance:
            exported = read_source(source, options)
            advance(1)
        written = write_checked(exported, output, compare=parity, progress=progress)
    _print(exported, written, compared=parity)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _print(exported: "Exported", written: "WrittenExport", *, compared: bool) -> None:
    from qcompiler.errors import printable
    from qcompiler.report.terminal import size

    graph = exported.model.graph
    lines = [*_values("input", graph.inputs), *_values("output", graph.outputs)]
    lines += [_sites(exported.model), *_parity(written.parity)]
    if not written.parity:
        why = "there are no example inputs" if compared else "--no-parity"
        lines.append(f"not compared with PyTorch: {why}")
    lines += exported.notes
    data = written.saved.data_path
    weights = f", weights in {data.name}" if data else ""
    lines.append(f"{written.saved.path}: {size(written.saved.bytes)}{weights}")
    if written.files:
        lines.append(f"beside it: {', '.join(path.name for path in written.files)}")
    for line in lines:
        click.echo(printable(line))


def _values(what: str, values: "Sequence[ir.Value]") -> list[str]:
    lines = []
    for value in values[:_SHOWN]:
        dims = ", ".join(str(getattr(dim, "value", dim)) for dim in value.shape or ())
        dtype = "?" if value.dtype is None else str(value.dtype.numpy())
        lines.append(f"{what:6}  {value.name}  {dtype} [{dims}]")
    if len(values) > _SHOWN:
        lines.append(f"{what:6}  ... {len(values) - _SHOWN} more, to {values[-1].name}")
    return lines


def _sites(model: "ir.Model") -> str:
    from qcompiler.ir.quantizable import find_sites

    found, _ = find_sites(model)
    kinds = Counter(site.node.op_type for site in found)
    of_kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"sites   {len(found)} weights to quantize{f': {of_kinds}' if found else ''}"


def _parity(differences: "Sequence[OutputDifference]") -> list[str]:
    worst_first = sorted(differences, key=lambda difference: -difference.max_rel)
    lines = [
        f"parity  {difference.name}: {difference.sqnr_db:.1f} dB from PyTorch, at most "
        f"{difference.max_abs:.2g} ({difference.max_rel:.2g} of the peak)"
        for difference in worst_first[:_SHOWN]
    ]
    if len(differences) > _SHOWN:
        lines.append(f"parity  ... {len(differences) - _SHOWN} more outputs, all nearer")
    return lines
