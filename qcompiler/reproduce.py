"""Compiling again from a manifest, and saying whether the same came out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qcompiler.compile import compile_model
from qcompiler.errors import UsageError
from qcompiler.ir.fingerprint import fingerprint
from qcompiler.ir.load import load_model
from qcompiler.options import CalibrationOptions, CompileOptions, TaskOptions
from qcompiler.plan import make_plan, with_data
from qcompiler.progress import Progress, SilentProgress
from qcompiler.quant.recipe import Recipe
from qcompiler.report.files import Manifest, package_versions, read_manifest
from qcompiler.settings import options_from


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What compiling again gave.

    Attributes:
        identical: Whether model and weights have the bytes that the manifest speaks of.
        expected: SHA-256 by the manifest, hex.
        found: SHA-256 of what came out.
        differences: What is not as it was: versions of packages, and options whose effect depends
            on more than they say; what may explain a difference.
    """

    identical: bool
    expected: str
    found: str
    differences: tuple[str, ...]


def reproduce(
    manifest: Path,
    source: Path,
    calibration: CalibrationOptions | None = None,
    *,
    task: TaskOptions | None = None,
    measurements: Path | None = None,
    custom_op_libraries: tuple[Path, ...] = (),
    progress: Progress | None = None,
) -> Reproduction:
    """Compile a model as a manifest says, and compare hashes; nothing is kept.

    Args:
        manifest: The manifest of the compilation.
        source: The model it began with.
        calibration: Where its samples are; how they are used, the manifest says.
        task: Where the samples of the task are that it was made for, the same.
        measurements: The file of latencies that it used.
        custom_op_libraries: Shared libraries with custom operators.
        progress: Where long work shows how far it is.

    Raises:
        UsageError: The manifest cannot be read, the model or the samples are not those it speaks
            of, or samples are missing.
        QCompilerError: As `compile_model` does.
    """
    wanted = read_manifest(manifest)
    _require_same("model", str(source), fingerprint(source), wanted.input.sha256)
    try:
        options = options_from(
            Recipe.from_text(wanted.recipe, f"{manifest}: recipe"),
            wanted.target,
            wanted.settings,
            *_wanted(wanted.settings, calibration, task, str(manifest)),
        )
    except (KeyError, TypeError, ValueError) as error:
        message = f"its settings are none that this version knows: {error}"
        raise UsageError(message, where=str(manifest), hint="compile anew") from error
    options = replace(
        options,
        measurements=measurements,
        custom_op_libraries=custom_op_libraries,
        inspect_kernels=False,
        compare=False,
    )
    _require_same_samples(source, options, wanted.settings)
    with TemporaryDirectory(prefix="qcompiler-") as folder:
        # The name of the data file is part of the model's bytes.
        output = Path(folder) / Path(wanted.output.name).name
        made = compile_model(source, options, output=output, progress=progress or SilentProgress())
    found, expected = made.report.output.sha256, wanted.output.sha256
    return Reproduction(
        found == expected, expected, found, tuple(_differences(wanted, measurements))
    )


def _wanted(
    settings: Mapping[str, Any],
    calibration: CalibrationOptions | None,
    task: TaskOptions | None,
    where: str,
) -> tuple[CalibrationOptions | None, TaskOptions | None]:
    """Return the samples that a compilation used, of those that were given.

    Raises:
        UsageError: Some are missing.
    """
    made_for = settings["task"]
    if made_for is not None and task is None:
        message = "the compilation was made for a task, and no samples of it were given"
        raise UsageError(message, where=where, hint="give --task DATA")
    calibrated = settings["calibration"] is not None
    if made_for is not None and made_for["alone"]:
        calibrated = False
    if calibrated and calibration is None:
        message = "the compilation was calibrated, and no samples were given"
        raise UsageError(message, where=where, hint="give --calibration DATA")
    return calibration if calibrated else None, task if made_for is not None else None


def _require_same_samples(
    source: Path, options: CompileOptions, settings: Mapping[str, Any]
) -> None:
    data = with_data(make_plan(options), load_model(source), lambda: "").data
    if data is None:
        return
    if settings["task"] is not None and data.task is not None:
        found = data.task.fingerprint()
        _require_same("samples of the task", data.task.origin, found, settings["task"]["sha256"])
    if settings["calibration"] is not None:
        found = data.samples.fingerprint()
        _require_same("samples", data.samples.origin, found, settings["calibration"]["sha256"])


def _require_same(what: str, where: str, found: str, expected: str) -> None:
    if found != expected:
        message = f"not the {what} of the manifest: sha256 {found[:16]}..., not {expected[:16]}..."
        raise UsageError(message, where=where, hint=f"give the {what} that the manifest speaks of")


def _differences(wanted: Manifest, measurements: Path | None) -> Iterator[str]:
    here = package_versions()
    for name, then in wanted.versions.items():
        if here.get(name) != then:
            yield f"{name} was {then} and is {here.get(name, 'unknown')}"
    if wanted.settings.get("never_slower") and measurements is None:
        yield "latency was measured again, which can decide otherwise: give --measurements FILE"
