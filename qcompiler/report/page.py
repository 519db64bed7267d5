"""The report as one HTML file: no network, names in it cannot become markup.

Names come from models, which nobody vouches for. The template escapes everything, data for the
charts is JSON in a block that is not executed, and the page's policy runs no script but its own.
"""

import base64
import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, StrictUndefined, Template, TemplateError
from markupsafe import Markup

from qcompiler.errors import UsageError
from qcompiler.report.files import read_report
from qcompiler.report.page_charts import chart_data, heat_maps
from qcompiler.report.records import EngineReport, NodeReport, PassReport, Report
from qcompiler.report.refusals import Refusal, meaning_of_rule
from qcompiler.report.terminal import calibration_lines, engine_lines, island_lines, size

_COLUMNS: Final = (
    *("#", "node", "op", "scheme", "kernel", "result dB", "alone dB", "weight dB"),
    *("before", "after", "bits", "why"),
)
_KINDS_SHOWN: Final = 12
_NAMES_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class _Tile:
    """One figure at the top; `tone` is "good", "bad" or empty."""

    label: str
    value: str
    detail: str
    tone: str = ""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a pass did, or left alone, in one way."""

    rule: str
    detail: str
    names: str


@dataclass(frozen=True, slots=True)
class _Left:
    """Ops that stayed in float for one reason."""

    rule: str
    reason: str
    nodes: tuple[str, ...]
    entry: Refusal | None


def page_of_file(path: Path) -> str:
    """Return the page of a report file, which may come from anywhere.

    Raises:
        UsageError: It is no report, or holds what a report does not (docs/report-schema.md).
    """
    report = read_report(path)
    try:
        return report_html(report)
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
        message = f"cannot be shown: {type(error).__name__}: {error}"
        hint = "docs/report-schema.md says what a report holds"
        raise UsageError(message, where=str(path), hint=hint) from error


def report_html(report: Report) -> str:
    """Return a report as a page that needs nothing else."""
    data = chart_data(report)
    heat = heat_maps(report)
    left = list(_left_in_float(report.nodes))
    scripts = [_asset("uPlot.iife.min.js"), _asset("page.js")]
    return _template().render(
        report=report,
        policy=_policy(scripts),
        styles=Markup(_asset("uPlot.min.css") + _asset("page.css")),
        scripts=[Markup(script) for script in scripts],
        tiles=list(_tiles(report)),
        measured=[*calibration_lines(report), *engine_lines(report.engine)],
        sections=_sections(report, data, heat, left),
        growth=data["growth"],
        windows=data["windows"],
        search=data["search"],
        island_lines=list(island_lines(report.islands)),
        heat=heat,
        schemes=sorted({node.scheme for node in report.nodes}),
        columns=_COLUMNS,
        left=left,
        passes=list(_passes(report.passes)),
        command=_command(report),
        reproduce=_reproduce(report),
        data=data,
        size=size,
        uplot_version=_version(),
        uplot_license=_asset("uPlot.LICENSE"),
    )


def _asset(name: str) -> str:
    return (files("qcompiler.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("report.html.j2"))


def _policy(scripts: Sequence[str]) -> str:
    """Return a Content-Security-Policy that runs these scripts and loads nothing."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in scripts)
    allowed = " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def _version() -> str:
    found = re.search(r"v(\d[\d.]*)", _asset("uPlot.iife.min.js")[:200])
    return found[1] if found else ""


def _tiles(report: Report) -> Iterator[_Tile]:
    summary = report.summary
    before, after = report.source.bytes, report.output.bytes
    times = f", {before / after:.2f} times smaller" if after else ""
    smaller = "good" if after < before else "bad"
    yield _Tile("size", size(after), f"float {size(before)}{times}", smaller)
    yield _Tile(
        "bits per weight",
        f"{summary.average_bits:.2f}",
        f"of quantized weights; {summary.average_bits_all:.2f} over all, "
        f"float {_float_bits(report):.0f}",
    )
    yield from _accuracy(report)
    if summary.latency_ratio is not None and summary.float_ms and summary.compiled_ms:
        yield _Tile(
            "latency",
            f"{summary.compiled_ms:.2f} ms",
            f"float {summary.float_ms:.2f} ms; {summary.latency_ratio:.2f} of its time",
            "good" if summary.latency_ratio < 1 else "bad",
        )
    else:
        yield _Tile("latency", "not measured", "--calibration and --never-slower measure it")
    if summary.compute_type is not None:
        detail = f"ops compute in {summary.compute_type}, {summary.float32_ops} in float32"
        yield _Tile("types", str(summary.narrow_ops), f"{detail}; Casts added: {summary.casts}")
    if report.engine is not None:
        yield _Tile("engine", size(report.engine.bytes), _engine(report.engine))
    yield _Tile("quantized", f"{summary.quantized} of {summary.sites}", _kernels(report))
    yield _Tile(
        "compiled in",
        f"{summary.seconds:.1f} s",
        f"{len(report.passes)} passes, peak memory {size(summary.peak_memory_bytes)}",
    )


def _engine(engine: EngineReport) -> str:
    by = f"by {engine.library} {engine.version}"
    if engine.weights is None:
        return by
    return f"{by}; {engine.as_planned} of {engine.weights} weights as planned"


def _float_bits(report: Report) -> float:
    distinct = {node.weight: node for node in report.nodes if node.weight is not None}
    elements = sum(node.elements for node in distinct.values())
    return 8 * report.summary.weight_bytes_before / elements if elements else 0.0


def _accuracy(report: Report) -> Iterator[_Tile]:
    if report.metric is not None:
        metric = report.metric
        tone = "good" if metric.compiled >= metric.source else ""
        yield _Tile(metric.name, f"{metric.compiled:.6g}", f"float {metric.source:.6g}", tone)
    outputs = report.calibration.outputs if report.calibration else ()
    found = [
        (value, entry.name, "as it runs here" if entry.ran else "Q/DQ computed in float")
        for entry in outputs
        if (value := entry.native_db if entry.ran else entry.emulated_db) is not None
    ]
    if found:
        worst, name, how = min(found)
        yield _Tile("output SQNR", f"{worst:.1f} dB", f"of {name}, against float, {how}")
    elif report.summary.worst_sqnr_db is not None:
        yield _Tile(
            "worst weight SQNR",
            f"{report.summary.worst_sqnr_db:.1f} dB",
            "outputs were not compared: --calibration does",
        )


def _kernels(report: Report) -> str:
    kernels = report.summary.integer_kernels
    return "ops with weights" if kernels is None else f"weight ops; {kernels} on integer kernels"


def _sections(
    report: Report, data: Mapping[str, Any], heat: Sequence[Any], left: Sequence[_Left]
) -> list[tuple[str, str]]:
    """Return anchors and names of the sections that the page has."""
    there = {
        "summary": ("Summary", True),
        "accuracy": ("Accuracy", data["growth"]),
        "nodes": ("Nodes", True),
        "float": ("Float", left),
        "channels": ("Ranges", report.channels),
        "windows": ("Reconstruction", data["windows"]),
        "search": ("Search", report.search),
        "islands": ("Islands", heat),
        "passes": ("Passes", True),
        "recipe": ("Do it again", True),
    }
    return [(anchor, name) for anchor, (name, shown) in there.items() if shown]


def _left_in_float(nodes: Sequence[NodeReport]) -> Iterator[_Left]:
    groups: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        if not node.quantized and node.reason:
            groups.setdefault((node.rule, node.reason), []).append(node.name)
    for (rule, reason), names in groups.items():
        yield _Left(rule, reason, tuple(names), meaning_of_rule(rule))


def _passes(records: Sequence[PassReport]) -> Iterator[dict[str, Any]]:
    longest = max((record.seconds for record in records), default=0.0)
    for record in records:
        changes = [_Kind(c.rule, c.detail, _some(c.nodes)) for c in record.changes]
        groups: dict[tuple[str, str], list[str]] = {}
        for skip in record.skips:
            groups.setdefault((skip.rule, skip.reason), []).append(skip.node)
        skips = [_Kind(*key, _some(names)) for key, names in groups.items()]
        yield {
            "record": record,
            "share": 100 * record.seconds / longest if longest else 0.0,
            "did": _did(record),
            "changes": changes[:_KINDS_SHOWN],
            "skips": skips[:_KINDS_SHOWN],
            "more": len(changes[_KINDS_SHOWN:]) + len(skips[_KINDS_SHOWN:]),
        }


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _did(record: PassReport) -> str:
    """Say in one line what a pass did."""
    parts = [f"{record.rewrites} changes" if record.rewrites else "changed nothing"]
    if record.skips:
        parts.append(f"{len(record.skips)} refused")
    parts += [f"{count:+d} {op}" for op, count in record.ops.items()]
    if record.nodes is not None:
        parts.append(f"{record.nodes} nodes")
    return ", ".join(parts)


def _command(report: Report) -> str:
    """Return the command that compiles the same again, as far as the report knows it."""
    settings = report.settings
    parts = ["qcompile", report.source.name, "-o", report.output.name]
    parts += ["--recipe", "recipe.toml", "--target", report.target]
    if settings.get("weight_range"):
        parts += ["--weight-range", str(settings["weight_range"])]
    for name in ("min_output_sqnr", "metric", "max_metric_drop"):
        if settings.get(name) is not None:
            parts += [f"--{name.replace('_', '-')}", str(settings[name])]
    parts += [part for name in settings.get("user_passes", ()) for part in ("--user-pass", name)]
    if settings.get("reconstruct", "none") != "none":
        parts += ["--reconstruct", str(settings["reconstruct"])]
    parts += ["--task", "TASK"] if settings.get("task") else []
    parts += ["--cast-io"] if settings.get("cast_io") else []
    if report.calibration is not None:
        task = settings.get("task")
        alone = isinstance(task, Mapping) and task.get("alone")
        parts += [] if alone else ["--calibration", "DATA"]
        parts += ["--no-never-slower"] if settings.get("never_slower") is False else []
    return shlex.join(parts)


def _reproduce(report: Report) -> str:
    """Return the command that compiles with exactly these settings and compares bytes."""
    manifest = str(Path(report.output.name).with_suffix(".manifest.json"))
    parts = ["qcompile", "reproduce", manifest, report.source.name]
    task = report.settings.get("task")
    alone = isinstance(task, Mapping) and task.get("alone")
    parts += ["--calibration", "DATA"] if report.calibration is not None and not alone else []
    parts += ["--task", "TASK"] if task else []
    return shlex.join(parts)
