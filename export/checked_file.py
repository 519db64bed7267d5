"""Writing an exported model so that it appears only if it computes what its module computes."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from qcompiler.errors import UsageError
from qcompiler.execution.outputs import OutputDifference
from qcompiler.export.exported import Exported
from qcompiler.export.parity import check_parity
from qcompiler.ir.save import SavedModel, save_model
from qcompiler.ir.weights import disk_errors
from qcompiler.progress import Progress


@dataclass(frozen=True, slots=True)
class WrittenExport:
    """What was written.

    Attributes:
        saved: The model.
        files: Files beside it: tokenizer and configuration.
        parity: How far each output is from PyTorch; empty where nothing was compared.
    """

    saved: SavedModel
    files: tuple[Path, ...]
    parity: tuple[OutputDifference, ...]


def refuse_unwritable(path: Path) -> None:
    """Raise UsageError where no model can be written, before the work that makes it."""
    if path.is_dir():
        message = "the output is a directory"
        raise UsageError(message, where=str(path), hint="name a file in it")
    folder = path.absolute().parent
    if not folder.is_dir():
        message = "there is no such folder"
        raise UsageError(message, where=str(folder), hint="make it, or name another")


def write_checked(
    exported: Exported, path: Path, *, compare: bool, progress: Progress
) -> WrittenExport:
    """Write a model, compare it with its module, and only then give it its name.

    Args:
        exported: The model; compared on its examples, if it has any, and on random inputs.
        path: The `.onnx` file.
        compare: Whether it is compared.
        progress: Shows the tasks "writing" and "comparing with PyTorch".

    Raises:
        ParityError: The graph computes something else than the module; nothing is written.
        UsageError: The folder cannot be written, or the disk is full.
    """
    refuse_unwritable(path)
    folder = path.absolute().parent
    with disk_errors(folder):
        scratch = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=folder)
    with scratch as name:
        draft = save_model(exported.model, Path(name) / path.name, progress=progress)
        differences: tuple[OutputDifference, ...] = ()
        if compare and exported.examples:
            differences = check_parity(
                exported.module,
                exported.model,
                exported.examples,
                file=draft.path,
                # Several examples are of several lengths already, and lengths may hang together.
                vary_lengths=len(exported.examples) == 1,
                progress=progress,
            )
        files = exported.write_files(folder)
        return WrittenExport(_move(draft, path), files, differences)


def _move(draft: SavedModel, path: Path) -> SavedModel:
    data = None if draft.data_path is None else path.with_name(draft.data_path.name)
    with disk_errors(path.absolute().parent):
        if draft.data_path is not None and data is not None:
            draft.data_path.replace(data)
        draft.path.replace(path)
    return SavedModel(path, data, draft.bytes)
