"""The report for a terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from qcompiler.errors import printable
from qcompiler.report.records import (
    EngineReport,
    IslandsReport,
    NodeReport,
    QualityReport,
    Report,
)
from qcompiler.report.search_points import search_lines

_MAX_ROWS = 40
_WIDTH_OF_A_FILE = 160
_NAMES_SHOWN = 3
_PASSES_SHOWN = 3
_TYPE_REASONS_SHOWN = 8
_UNPLANNED_SHOWN = 10


def escape(text: str) -> str:
    """Return text as it is to be shown: no markup, no control characters."""
    return escape_markup(printable(text))


def size(count: float) -> str:
    """Return bytes in a unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _console() -> Console:
    """Return standard output; where it is no terminal, wide enough that names stay whole."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_FILE)


def print_report(report: Report, path: Path, console: Console | None = None) -> None:
    """Print what was done to every node, the totals, and what to know."""
    console = console or _console()
    console.print(_node_table(report.nodes))
    for line in _totals(report):
        console.print(escape(line), highlight=False)
    for line in (*calibration_lines(report), *engine_lines(report.engine)):
        console.print(escape(line), highlight=False)
    for line in island_lines(report.islands):
        console.print(escape(line), highlight=False)
    for line in (*search_lines(report.search), *_reasons(report.nodes), *_types(report.nodes)):
        console.print(escape(line), highlight=False)
    for warning in report.warnings[:_MAX_ROWS]:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    if len(report.warnings) > _MAX_ROWS:
        console.print(f"[yellow]and {len(report.warnings) - _MAX_ROWS} more warnings[/]")
    console.print(f"wrote {escape(str(path))}", highlight=False, soft_wrap=True)


def calibration_lines(report: Report) -> Iterator[str]:
    """Yield what ranges come from, and how near the outputs stayed."""
    calibration, compute = report.calibration, report.summary.compute_type
    if calibration is None:
        return
    how_else = "" if compute is None else f"values rounded to {compute} and "
    how = f"calibrated by {calibration.observer}" if calibration.observer else "outputs compared"
    yield f"{how} on {calibration.source}"
    for output in calibration.outputs:
        yield (
            f"output {output.name}: {_native(output)}, "
            f"{_db(output.emulated_db)} with {how_else}Q/DQ computed in float"
        )


def island_lines(islands: IslandsReport | None) -> Iterator[str]:
    """Yield what islands hold and cost."""
    if islands is None:
        return
    part = islands.elements / islands.weights if islands.weights else 0.0
    yield (
        f"{part:.2%} of the weights in {islands.kind} islands hold {islands.share:.1%} of the "
        f"{islands.saliency} saliency for {islands.task}"
    )
    yield (
        f"{islands.average_bits:.3f} bits per weight with islands and their indices, "
        f"{islands.average_bits_without:.3f} without"
    )
    shares = (f"{name}: {share:.1%}" for name, share in islands.concentration.items())
    yield f"saliency in the best {', '.join(shares)}"


def engine_lines(engine: EngineReport | None) -> Iterator[str]:
    """Yield what an engine is and what lies in it, one line a thing."""
    if engine is None:
        return
    where = f" for {', '.join(engine.capabilities)}" if engine.capabilities else ""
    yield (
        f"engine {engine.name}{where} by {engine.library} {engine.version}: {size(engine.bytes)}, "
        f"constants of the graph {size(engine.planned_bytes)}; {engine.layers} layers, built in "
        f"{engine.seconds:.1f} s"
    )
    if engine.weights is not None:
        yield f"{engine.as_planned} of {engine.weights} weights lie in it as planned"
    for weight in engine.other[:_UNPLANNED_SHOWN]:
        found = "not found" if weight.found is None else f"found as {weight.found}"
        yield f"  {weight.name}: planned as {weight.planned}, {found}"
    if len(engine.other) > _UNPLANNED_SHOWN:
        yield f"  and {len(engine.other) - _UNPLANNED_SHOWN} more, in the report"
    for text in engine.warnings:
        yield f"  {engine.library} warns: {text}"


def _native(output: QualityReport) -> str:
    if not output.ran:
        return "not run as it is here"
    return f"{_db(output.native_db)} from float as it runs here"


def _db(value: float | None) -> str:
    return "no distance" if value is None else f"{value:.1f} dB"


def _node_table(nodes: Sequence[NodeReport]) -> Table:
    """Show every node of a small model, and one row a kind of treatment of a large one."""
    shown = [node for node in nodes if node.weight is not None]
    table = Table(box=None, pad_edge=False)
    columns = ("node", "op", "scheme", "SQNR dB", "before", "after", "bits", "kernel")
    for name in columns:
        names_things = name in ("node", "kernel")
        table.add_column(
            name,
            justify="right" if name in columns[3:7] else "left",
            no_wrap=not names_things,
            overflow="fold",
        )
    if len(shown) <= _MAX_ROWS:
        for node in shown:
            table.add_row(*_cells(node))
        return table
    groups: dict[tuple[str, str, str | None], list[NodeReport]] = {}
    for node in shown:
        groups.setdefault((node.op_type, node.scheme, node.kernel), []).append(node)
    for (op_type, scheme, kernel), members in groups.items():
        table.add_row(*_group_cells(op_type, scheme, kernel, members))
    return table


def _cells(node: NodeReport) -> tuple[str, ...]:
    return (
        escape(node.name),
        node.op_type,
        node.scheme,
        "" if node.sqnr_db is None else f"{node.sqnr_db:.1f}",
        size(node.bytes_before),
        size(node.bytes_after),
        f"{node.bits_per_weight:.2f}",
        escape(node.kernel or ""),
    )


def _group_cells(
    op_type: str, scheme: str, kernel: str | None, members: Sequence[NodeReport]
) -> tuple[str, ...]:
    distinct = list({node.weight: node for node in members}.values())
    qualities = [node.sqnr_db for node in members if node.sqnr_db is not None]
    elements = sum(node.elements for node in distinct)
    after = sum(node.bytes_after for node in distinct)
    return (
        f"{len(members)} nodes",
        op_type,
        scheme,
        f"{min(qualities):.1f}..{max(qualities):.1f}" if qualities else "",
        size(sum(node.bytes_before for node in distinct)),
        size(after),
        f"{8 * after / elements:.2f}" if elements else "",
        escape(kernel or ""),
    )


def _totals(report: Report) -> Iterator[str]:
    summary = report.summary
    before, after = summary.weight_bytes_before, summary.weight_bytes_after
    ratio = f" ({before / after:.2f}x smaller)" if after else ""
    yield (
        f"{summary.quantized} of {summary.sites} weight ops quantized; weights "
        f"{size(before)} -> {size(after)}{ratio}; file {size(report.source.bytes)} -> "
        f"{size(report.output.bytes)}"
    )
    yield (
        f"{summary.average_bits:.2f} bits per quantized weight, scales and zero points counted; "
        f"{summary.average_bits_all:.2f} over all weights"
    )
    if summary.integer_kernels is not None:
        yield (
            f"{summary.integer_kernels} of {summary.quantized} quantized ops run on integer "
            f"weights in {report.runtime}"
        )
    if summary.compute_type is not None:
        yield (
            f"{summary.narrow_ops} ops compute in {summary.compute_type}, {summary.float32_ops} "
            f"stay in float32; Casts added between them: {summary.casts}"
        )
    if summary.float_ms is not None and summary.compiled_ms is not None:
        yield (
            f"latency {summary.float_ms:.2f} ms -> {summary.compiled_ms:.2f} ms on the largest "
            f"sample, {summary.latency_ratio:.2f} of float's time; regions: "
            f"{_regions(report.nodes)}"
        )
    if report.windows:
        kept = [window for window in report.windows if window.kept]
        yield (
            f"{len(kept)} of {len(report.windows)} windows nearer to float than they were; "
            f"{sum(w.seconds for w in report.windows):.0f} s"
        )
    yield f"{summary.seconds:.1f} s, peak memory {size(summary.peak_memory_bytes)}"
    yield _slowest(report)


def _regions(nodes: Sequence[NodeReport]) -> str:
    """Say what became of the weight ops of measured regions."""
    measured = [node for node in nodes if node.float_ms is not None and node.weight is not None]
    schemes: dict[str, int] = {}
    for node in measured:
        schemes[node.scheme] = schemes.get(node.scheme, 0) + 1
    return ", ".join(f"{count} ops {scheme}" for scheme, count in schemes.items()) or "none"


def _reasons(nodes: Sequence[NodeReport]) -> Iterator[str]:
    """Say why ops got what they got, one line for all that share scheme, rule and reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for node in nodes:
        if node.weight is not None:
            groups.setdefault((node.scheme, node.rule, node.reason), []).append(node.name)
    for (scheme, rule, reason), names in list(groups.items())[:_MAX_ROWS]:
        more = ", ..." if len(names) > _NAMES_SHOWN else ""
        shown = ", ".join(names[:_NAMES_SHOWN]) + more
        yield f"{scheme} by {rule}: {len(names)} ({shown}): {reason}"
    if len(groups) > _MAX_ROWS:
        yield f"and {len(groups) - _MAX_ROWS} more reasons; the report and `explain` have them"


def _types(nodes: Sequence[NodeReport]) -> Iterator[str]:
    """Say why ops stay in float32, one line for all that have the same reason."""
    groups: dict[str, list[str]] = {}
    for node in nodes:
        if node.type_reason is not None:
            groups.setdefault(node.type_reason, []).append(node.name)
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    for reason, names in ranked[:_TYPE_REASONS_SHOWN]:
        more = ", ..." if len(names) > _NAMES_SHOWN else ""
        yield f"float32: {len(names)} ({', '.join(names[:_NAMES_SHOWN])}{more}): {reason}"
    rest = ranked[_TYPE_REASONS_SHOWN:]
    if rest:
        count = sum(len(names) for _, names in rest)
        yield f"float32: {count} more, for other reasons; the report and `explain` have them"


def _slowest(report: Report) -> str:
    """Return the passes that took longest, with their seconds."""
    passes = sorted(report.passes, key=lambda record: -record.seconds)[:_PASSES_SHOWN]
    times = ", ".join(f"{record.name} {record.seconds:.2f} s" for record in passes)
    return f"of {len(report.passes)} passes the longest: {times}"


def print_inspection(found: dict[str, Any], console: Console | None = None) -> None:
    """Print what `inspect_model` found."""
    console = console or _console()
    opsets = ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in found["opsets"].items())
    console.print(f"{escape(found['model'])}: {escape(opsets)}; {escape(found['producer'])}")
    for kind in ("inputs", "outputs"):
        for line in found[kind]:
            console.print(f"  {kind[:-1]} {escape(line)}", highlight=False)
    ops = ", ".join(f"{count} {op}" for op, count in found["ops"].items())
    console.print(escape(f"ops: {ops}"), highlight=False)
    table = Table(box=None, pad_edge=False)
    for name in ("site", "op", "weight", "shape", "type", "size"):
        table.add_column(name, justify="right" if name == "size" else "left")
    for site in found["sites"]:
        table.add_row(
            escape(site["name"]),
            site["op_type"],
            escape(site["weight"]),
            escape(str(site["shape"])),
            site["dtype"],
            size(site["bytes"]),
        )
    console.print(table)
    for other in found["not_quantizable"]:
        line = f"not quantizable: {other['name']} ({other['op_type']}): {other['reason']}"
        console.print(escape(line), highlight=False)
    console.print(f"{len(found['blocks'])} blocks:")
    for block in found["blocks"]:
        label = f" {block['label']}" if block["label"] else ""
        line = f"  {block['index']}{label}: {block['sites']} sites, ends in {block['output']}"
        console.print(escape(line), highlight=False)
    console.print(
        f"weights {size(found['weight_bytes'])} of {size(found['constant_bytes'])} in constants"
    )
