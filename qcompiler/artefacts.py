"""What a compilation leaves on disk: made in a hidden folder, and renamed into place when done."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qcompiler.engine import EngineRequest
from qcompiler.errors import UsageError
from qcompiler.export.checked_file import refuse_unwritable
from qcompiler.export.to_tensorrt import EngineOptions
from qcompiler.ir.load import load_model
from qcompiler.ir.locked_folder import make_scratch_folder
from qcompiler.ir.save import SavedModel
from qcompiler.report.files import report_json
from qcompiler.report.page import report_html
from qcompiler.report.records import Report
from qcompiler.report.verdict import Verdict


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What a compilation made.

    Attributes:
        path: The compiled model.
        data_path: Its external data file, None when weights are inside the model.
        report_path: The report, JSON (docs/report-schema.md).
        manifest_path: Hashes, versions and options; identical for identical compilations.
        report: The report, as an object.
        engine_path: The engine, None where none was asked for; its manifest lies beside it.
        engine_options: How an engine is built from the model, with the shapes of its inputs; None
            where none was asked for.
        verdict: What the gate found; None without one.
        page_path: The report as a page for a browser; None unless `CompileOptions.html`.
    """

    path: Path
    data_path: Path | None
    report_path: Path
    manifest_path: Path
    report: Report
    engine_path: Path | None = None
    engine_options: EngineOptions | None = None
    verdict: Verdict | None = None
    page_path: Path | None = None

    def model(self) -> ir.Model:
        """Load the compiled model, lazily."""
        return load_model(self.path)


@contextmanager
def workspace_for(output: Path) -> Iterator[Path]:
    """Make a hidden folder beside the output, so that finished files can be renamed into place.

    What a run for the same output left there when it was killed is removed.
    """
    if not output.parent.is_dir():
        message = "the folder does not exist"
        raise UsageError(message, where=str(output.parent), hint="create it first")
    try:
        folder, held = make_scratch_folder(output.parent, f".qcompile-{output.stem}.")
    except OSError as error:
        message = f"cannot write there: {error.strerror}"
        raise UsageError(message, where=str(output.parent)) from error
    try:
        (folder / "out").mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


@contextmanager
def engine_workspace_for(engine: EngineRequest | None) -> Iterator[Path]:
    """Make a folder for an engine beside where it goes; no folder where there is none."""
    if engine is None or engine.elsewhere:
        yield Path()
        return
    refuse_unwritable(engine.path)
    with workspace_for(engine.path) as folder:
        yield folder


def publish(
    saved: SavedModel, path: Path, report: Report, manifest: str, *, html: bool
) -> CompileResult:
    """Write what goes with the finished model beside it, and rename all of it into place."""
    folder = saved.path.parent
    report_path = path.with_suffix(".report.json")
    manifest_path = path.with_suffix(".manifest.json")
    data_path = None if saved.data_path is None else path.with_name(saved.data_path.name)
    page_path = path.with_suffix(".report.html") if html else None
    texts = {report_path: report_json(report), manifest_path: manifest}
    if page_path is not None:
        texts[page_path] = report_html(report)
    try:
        for final, text in texts.items():
            (folder / final.name).write_text(text, encoding="utf-8")
        # The model goes last: whoever sees it finds everything it needs.
        finished = [*texts, path]
        for final in finished if data_path is None else [data_path, *finished]:
            (folder / final.name).replace(final)
    except OSError as error:
        message = f"cannot write the result: {error.strerror}"
        raise UsageError(message, where=str(path)) from error
    return CompileResult(path, data_path, report_path, manifest_path, report, page_path=page_path)
