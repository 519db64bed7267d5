"""The report and the manifest as JSON text."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from qcompiler.calibration.channel_profiles import ChannelProfile
from qcompiler.errors import UsageError
from qcompiler.report.records import (
    SCHEMA,
    SCHEMA_VERSION,
    CalibrationReport,
    ChangeReport,
    EngineReport,
    FileFacts,
    IslandSite,
    IslandsReport,
    MetricReport,
    NodeReport,
    OutputCheck,
    PassReport,
    QualityReport,
    Report,
    SkipReport,
    Summary,
    UnplannedWeight,
    WindowReport,
)
from qcompiler.report.search_points import SearchPoint, SearchReport

_MANIFEST: Final = "qcompiler-manifest"
_MANIFEST_VERSION: Final = 1
_VERSIONS = (
    "qcompiler",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
)


def report_json(report: Report) -> str:
    """Return the report as JSON text; numbers that are not finite do not occur."""
    return json.dumps(asdict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_report(path: Path) -> Report:
    """Read a report back.

    Raises:
        UsageError: Not a report, or one of a schema version this compiler does not know.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema") != SCHEMA or content.get("schema_version") != SCHEMA_VERSION:
            message = f"is not a {SCHEMA} of version {SCHEMA_VERSION}"
            raise UsageError(message, where=str(path))
        return _report(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"cannot be read as a report: {error}"
        raise UsageError(message, where=str(path)) from error


def _report(content: dict[str, Any]) -> Report:
    return Report(
        **{
            **content,
            "source": FileFacts(**content["source"]),
            "output": FileFacts(**content["output"]),
            "summary": Summary(**content["summary"]),
            "nodes": tuple(
                NodeReport(**{**node, "origins": tuple(node["origins"])})
                for node in content["nodes"]
            ),
            "passes": tuple(_pass(record) for record in content["passes"]),
            "output_checks": tuple(OutputCheck(**check) for check in content["output_checks"]),
            "warnings": tuple(content["warnings"]),
            "calibration": _calibration(content.get("calibration")),
            "islands": _islands(content.get("islands")),
            "search": _search(content.get("search")),
            "engine": _engine(content.get("engine")),
            "windows": tuple(WindowReport(**window) for window in content.get("windows", ())),
            "metric": MetricReport(**metric) if (metric := content.get("metric")) else None,
            "channels": tuple(_profile(entry) for entry in content.get("channels", ())),
        }
    )


def _pass(content: dict[str, Any]) -> PassReport:
    changes = (
        ChangeReport(entry["rule"], entry["detail"], tuple(entry["nodes"]))
        for entry in content.get("changes", ())
    )
    return PassReport(
        **{
            **content,
            "skips": tuple(SkipReport(**skip) for skip in content["skips"]),
            "changes": tuple(changes),
            "removed": tuple(content.get("removed", ())),
        }
    )


def _profile(content: dict[str, Any]) -> ChannelProfile:
    lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
    return ChannelProfile(**{**content, **lists})


def _calibration(content: dict[str, Any] | None) -> CalibrationReport | None:
    if content is None:
        return None
    outputs = tuple(QualityReport(**entry) for entry in content["outputs"])
    return CalibrationReport(**{**content, "outputs": outputs})


def _islands(content: dict[str, Any] | None) -> IslandsReport | None:
    if content is None:
        return None
    sites = tuple(IslandSite(**entry) for entry in content["sites"])
    return IslandsReport(**{**content, "sites": sites})


def _search(content: dict[str, Any] | None) -> SearchReport | None:
    if content is None:
        return None
    points = tuple(SearchPoint(**entry) for entry in content["points"])
    return SearchReport(**{**content, "bounds": tuple(content["bounds"]), "points": points})


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a compilation was made of, and what it made.

    Attributes:
        input: The source model.
        output: The compiled model.
        target: Name of the target.
        recipe: As TOML.
        settings: What was in force beside the recipe.
        versions: Installed versions by package.
        inputs: What calibration saw of float inputs, by name (`InputStatistics`).
        gate: What a gate measured when it was compiled, without times; empty without one.
    """

    input: FileFacts
    output: FileFacts
    target: str
    recipe: str
    settings: dict[str, Any]
    versions: dict[str, str]
    inputs: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest back.

    Raises:
        UsageError: No manifest, or one of a schema version this compiler does not know.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _MANIFEST or content["schema_version"] != _MANIFEST_VERSION:
            message = f"is not a {_MANIFEST} of version {_MANIFEST_VERSION}"
            raise UsageError(message, where=str(path))
        return Manifest(
            FileFacts(**content["input"]),
            FileFacts(**content["output"]),
            str(content["target"]),
            str(content["recipe"]),
            dict(content["settings"]),
            dict(content["versions"]),
            dict(content.get("inputs") or {}),
            dict(content.get("gate") or {}),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"cannot be read as a manifest: {error}"
        raise UsageError(message, where=str(path)) from error


def _engine(content: dict[str, Any] | None) -> EngineReport | None:
    if content is None:
        return None
    lists = {name: tuple(content[name]) for name in ("capabilities", "warnings")}
    other = tuple(UnplannedWeight(**entry) for entry in content["other"])
    return EngineReport(**{**content, **lists, "other": other})


def manifest_json(
    report: Report,
    settings: Mapping[str, object],
    inputs: Mapping[str, object] | None = None,
    gate: Mapping[str, object] | None = None,
) -> str:
    """Return the manifest: what went in, what came out, and with what.

    It holds no time and no path, so that two equal compilations give equal manifests.

    Args:
        report: The report of the compilation.
        settings: What was in force beside the recipe, defaults included: plain JSON values.
        inputs: What calibration saw of float inputs, the same.
        gate: What a gate measured, the same.
    """
    content = {
        "schema": _MANIFEST,
        "schema_version": _MANIFEST_VERSION,
        "input": asdict(report.source),
        "output": asdict(report.output),
        "target": report.target,
        "recipe": report.recipe,
        "recipe_sha256": hashlib.sha256(report.recipe.encode()).hexdigest(),
        "settings": dict(settings),
        "inputs": dict(inputs or {}),
        "gate": dict(gate or {}),
        "versions": package_versions(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def package_versions() -> dict[str, str]:
    """Return the installed version of each package that results depend on."""
    return {name: package_version(name) for name in _VERSIONS}


def package_version(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
