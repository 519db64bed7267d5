"""Edge bundles: all that a device needs to build an engine of its own, in one folder."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import onnx_ir as ir

from qcompiler.artefacts import CompileResult
from qcompiler.back_off import compile_backing_off
from qcompiler.bundle_files import (
    LIST,
    MODEL,
    REPORTS,
    SCRIPT,
    Bundle,
    bundle_json,
    check_files,
    facts_of,
    read_bundle,
    refuse_other_folder,
)
from qcompiler.compile import compile_model
from qcompiler.engine import EngineRequest, build_and_check, publish_engine, varying_inputs
from qcompiler.errors import InternalError, ModelError, UsageError
from qcompiler.export.checked_file import refuse_unwritable
from qcompiler.export.to_tensorrt import LIBRARIES, require_library
from qcompiler.export.trtexec_script import (
    DEVICE_ENGINE,
    TIMING_CACHE,
    trtexec_script,
    why_no_script,
)
from qcompiler.ir.dataflow import standard_opset
from qcompiler.ir.fingerprint import fingerprint
from qcompiler.ir.load import load_model
from qcompiler.ir.locked_folder import make_scratch_folder
from qcompiler.ir.tensor_sites import tensor_sites
from qcompiler.ir.weights import disk_errors
from qcompiler.options import CompileOptions
from qcompiler.progress import Progress, SilentProgress
from qcompiler.report.records import EngineReport, FileFacts

SUFFIX: Final = ".qbundle"
"""By this an output is known for a bundle."""
_REPRODUCERS: Final = "qcompiler-reproducer-*"


@dataclass(frozen=True, slots=True)
class BundleResult:
    """What was made.

    Attributes:
        path: The bundle, a folder.
        model: What was compiled; its paths are in the bundle.
        no_script: Why the bundle has no `build.sh`; None where it has one.
    """

    path: Path
    model: CompileResult
    no_script: str | None


@dataclass(frozen=True, slots=True)
class DeviceEngine:
    """An engine that was built from a bundle.

    Attributes:
        path: The engine; its manifest lies beside it.
        report: What lies in it.
    """

    path: Path
    report: EngineReport


def is_bundle_name(output: Path | str | None) -> bool:
    """Say whether an output is a bundle by its name."""
    return output is not None and Path(output).suffix == SUFFIX


def compile_bundle(
    source: Path | str | ir.Model,
    options: CompileOptions,
    output: Path | str,
    *,
    back_off: bool = False,
    progress: Progress | None = None,
) -> BundleResult:
    """Compile a model into a folder from which a device builds its engine.

    The folder holds the model with its external data, report and manifest, `build.sh`, hashes of
    what is built from, and an engine where `options.engine` names one by a plain file name.

    Args:
        source: Path of an ONNX model, or a model in memory.
        options: What to do, for a target that has engines.
        output: The folder; an older bundle of that name is replaced at the end.
        back_off: Whether ops are left in float where the engine cannot be built otherwise.
        progress: Where long work shows how far it is.

    Raises:
        UsageError: Options or paths cannot be used, or an input has no shapes.
        QCompilerError: All that `compile_model` raises.

    The folder appears complete or not at all.
    """
    folder = Path(output)
    _refuse_output(source, folder)
    engine = _engine_name(options.engine)
    with _scratch(folder) as scratch:
        made = scratch / "bundle"
        made.mkdir()
        inside = replace(
            options,
            engine=None if engine is None else made / engine,
            engine_elsewhere=True,
        )
        try:
            compiled = compile_backing_off if back_off else compile_model
            result = compiled(source, inside, output=made / MODEL, progress=progress)
        except InternalError:
            _keep_reproducers(made, folder.absolute().parent)
            raise
        with disk_errors(folder.absolute().parent):
            no_script = _finish(made, result, engine, progress or SilentProgress())
            _move(made, folder, scratch / "old")
    return BundleResult(folder, _moved(result, folder), no_script)


def _refuse_output(source: Path | str | ir.Model, folder: Path) -> None:
    refuse_other_folder(folder)
    if not folder.absolute().parent.is_dir():
        message = "the folder does not exist"
        raise UsageError(message, where=str(folder.absolute().parent), hint="create it first")
    if isinstance(source, ir.Model) or not folder.exists():
        return
    if Path(source).resolve().is_relative_to(folder.resolve()):
        message = "the bundle would take the place of the model it is made from"
        raise UsageError(message, where=str(folder), hint="choose another -o")


def _engine_name(engine: Path | None) -> str | None:
    """Return the name of an engine in a bundle; UsageError where it is more than a name."""
    if engine is None:
        return None
    name = engine.name
    taken = name == DEVICE_ENGINE or engine.suffix not in (".engine", ".plan")
    if str(engine) != name or taken or not name.isprintable():
        message = "the engine of a bundle has a plain file name that ends in .engine or .plan"
        raise UsageError(message, where=str(engine), hint="give --engine model.engine")
    return name


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a hidden folder beside a bundle, on the same file system."""
    parent = folder.absolute().parent
    with disk_errors(parent):
        scratch, held = make_scratch_folder(parent, f".qcompile-{folder.name}.")
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(held)


def _keep_reproducers(made: Path, parent: Path) -> None:
    """Move what a defect left out of a folder that is about to go."""
    for kept in made.glob(_REPRODUCERS):
        if not (parent / kept.name).exists():
            kept.rename(parent / kept.name)


def _finish(
    made: Path, result: CompileResult, engine: str | None, progress: Progress
) -> str | None:
    """Write script and list beside a compiled model; returns why there is no script."""
    chosen = result.engine_options
    assert chosen is not None, "it was asked for"
    inputs = varying_inputs(result.model())
    no_script = why_no_script(chosen, inputs)
    if no_script is None:
        needed = [result.path] + ([result.data_path] if result.data_path else [])
        sums = {path.name: facts_of(path, progress).sha256 for path in needed}
        script = made / SCRIPT
        script.write_text(trtexec_script(chosen, inputs, MODEL, sums), encoding="utf-8")
        script.chmod(0o755)
    files = tuple(
        facts_of(path, progress) for path in sorted(made.iterdir()) if path.name not in REPORTS
    )
    bundle = Bundle(version("qcompiler"), result.report.target, chosen, engine, no_script, files)
    (made / LIST).write_text(bundle_json(bundle), encoding="utf-8")
    return no_script


def _move(made: Path, folder: Path, old: Path) -> None:
    """Give a finished folder its name, in place of an older bundle."""
    if folder.exists():
        folder.rename(old)
    try:
        made.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


def _moved(result: CompileResult, folder: Path) -> CompileResult:
    return replace(
        result,
        path=folder / result.path.name,
        data_path=None if result.data_path is None else folder / result.data_path.name,
        report_path=folder / result.report_path.name,
        manifest_path=folder / result.manifest_path.name,
        page_path=None if result.page_path is None else folder / result.page_path.name,
        engine_path=None if result.engine_path is None else folder / result.engine_path.name,
    )


def build_bundle(
    folder: Path | str,
    output: Path | str | None = None,
    *,
    timing_cache: Path | None = None,
    memory_limit: int | None = None,
    python: Path | None = None,
    progress: Progress | None = None,
) -> DeviceEngine:
    """Build the engine of a bundle on this machine, as its `build.sh` does.

    Args:
        folder: The bundle.
        output: The engine; None is `device.engine` in the bundle.
        timing_cache: A file of timings that is read if it exists, and written; None is
            `timing.cache` in the bundle if the engine goes there, too.
        memory_limit: Bytes that the building process may hold.
        python: The interpreter that has the library; None is this one.
        progress: Shows hashing, and the library's phases.

    Raises:
        UsageError: The folder is no bundle, the library is missing, or the engine cannot be
            written.
        ModelError: A file is missing or has changed.
        TargetError: The library refuses the model, fails or crashes.
    """
    folder = Path(folder)
    progress = progress or SilentProgress()
    bundle = read_bundle(folder)
    if output is None:
        timing_cache = timing_cache or folder / TIMING_CACHE
    options = replace(
        bundle.options, timing_cache=timing_cache, memory_limit=memory_limit, python=python
    )
    require_library(options)
    path = folder / DEVICE_ENGINE if output is None else Path(output)
    names = {file.name for file in bundle.files}
    taken = {*names, LIST, *REPORTS}
    if path.absolute().parent.resolve() == folder.resolve() and path.name in taken:
        message = "is a file of the bundle"
        raise UsageError(message, where=str(path), hint="choose another -o")
    refuse_unwritable(path)
    check_files(folder, bundle.files, progress)
    model = load_model(folder / MODEL)
    _require_listed(model, names)
    request = EngineRequest(path, options, LIBRARIES[options.library].title)
    with _scratch(path) as scratch:
        made = scratch / path.name
        report = build_and_check(request, folder / MODEL, model, made, progress)
        publish_engine(request, made, report, _facts(folder / MODEL, bundle, model))
    return DeviceEngine(path, report)


def _require_listed(model: ir.Model, names: set[str]) -> None:
    """Raise ModelError where a model reads a file whose hash is not known."""
    tensors = (site.tensor for site in tensor_sites(model))
    files = {Path(tensor.path).name for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    unknown = sorted({MODEL, *files} - names)
    if unknown:
        message = f"the list of the bundle does not have {unknown[0]}"
        raise ModelError(message, where=LIST, hint="make the bundle anew")


def _facts(path: Path, bundle: Bundle, model: ir.Model) -> FileFacts:
    data = f"{MODEL}.data"
    size = sum(file.bytes for file in bundle.files if file.name in (MODEL, data))
    return FileFacts(path.name, size, fingerprint(path), standard_opset(model))
