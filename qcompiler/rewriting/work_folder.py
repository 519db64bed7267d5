"""Keeping the newest intermediate model on disk, so that a killed compilation can go on.

The graph is the only state, so the model after a pass and the records of what passes did are all
that the passes behind it need.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import onnx_ir as ir

from qcompiler.errors import UsageError
from qcompiler.ir.load import load_model
from qcompiler.ir.locked_folder import lock_folder
from qcompiler.ir.save import save_model
from qcompiler.ir.weights import constant_bytes, disk_errors
from qcompiler.progress import SilentProgress
from qcompiler.rewriting.base import Numerics, PassRecord, Rewrite, Skip
from qcompiler.rewriting.stages import Stage
from qcompiler.rewriting.window_record import WindowRewrite

_SCHEMA: Final = "qcompiler-work"
_SCHEMA_VERSION: Final = 1
_HEAD: Final = "work.json"
_MODEL: Final = "model.onnx"
_RECORDS: Final = "passes.json"
_WINDOWS: Final = "windows"
_UNFINISHED: Final = ".unfinished-"
_BYTES_PER_SECOND: Final = 200e6
_SAVING_SHARE: Final = 0.1
_FIELDS_SHOWN: Final = 3
_VALUE_SHOWN: Final = 60

FEWEST_SECONDS: Final = 5.0
"""Work that is not worth keeping."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a compilation can go on.

    Attributes:
        model: The model after the last pass of `records`; its weights lie in the work folder.
        records: What the passes up to there did.
    """

    model: ir.Model
    records: tuple[PassRecord, ...]


def windows_in(directory: Path) -> Path:
    """Return where in a work folder `reconstruct-blocks` keeps the windows it has finished."""
    return directory / _WINDOWS


class WorkFolder:
    """A folder that one compilation keeps its newest intermediate model in.

    It holds `work.json`, which says whose it is, and one folder a checkpoint, such as
    `012-calibrate`, which gets that name when it is complete and on disk. A pass that takes hours
    keeps its own parts beside them (`windows_in`). A context manager; one process at a time can
    hold it.

    Args:
        directory: The folder; it is made if it is missing.
        identity: What decides the bytes of the result, as plain JSON values. Only the same
            compilation may go on.
        fewest_seconds: A pass leaves a checkpoint when so much work would be lost, and writing
            it takes an estimated tenth of that at most; 0 is after every pass.

    Raises:
        UsageError: The folder belongs to another compilation (says in which fields they differ),
            is used by another process, holds something else, or cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        identity: Mapping[str, Any],
        fewest_seconds: float = FEWEST_SECONDS,
    ) -> None:
        self.directory = directory
        self._identity = json.loads(json.dumps(identity))
        self._fewest_seconds = fewest_seconds
        self._resumed: Path | None = None
        self._kept_at = time.monotonic()
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(directory)
        try:
            self._claim()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def newest(self) -> Checkpoint | None:
        """Return where to go on, None where nothing was finished."""
        folders = self._checkpoints()
        if not folders:
            return None
        self._resumed = folders[-1]
        try:
            content = json.loads((self._resumed / _RECORDS).read_text(encoding="utf-8"))
            records = tuple(map(_record, content))
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"cannot be read as the records of a compilation: {error}"
            hint = "remove the work folder and compile again"
            raise UsageError(message, where=str(self._resumed / _RECORDS), hint=hint) from error
        return Checkpoint(load_model(self._resumed / _MODEL), records)

    def keep(self, model: ir.Model, records: Sequence[PassRecord]) -> None:
        """Write a checkpoint if enough work would be lost without it.

        Raises:
            UsageError: The disk is full, or the folder cannot be written.
        """
        saving = constant_bytes(model) / _BYTES_PER_SECOND
        worth_it = self._fewest_seconds and max(self._fewest_seconds, saving / _SAVING_SHARE)
        if time.monotonic() - self._kept_at < worth_it:
            return
        with disk_errors(self.directory):
            self._write(model, records)
        self._kept_at = time.monotonic()

    def finish(self) -> None:
        """Remove what was kept: the result is where it belongs."""
        for folder in (*self._checkpoints(), windows_in(self.directory)):
            shutil.rmtree(folder, ignore_errors=True)
        (self.directory / _HEAD).unlink(missing_ok=True)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _claim(self) -> None:
        for left in self.directory.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        head = self.directory / _HEAD
        if head.exists():
            _require_same(_read_head(head), self._identity, self.directory)
            return
        if any(self.directory.iterdir()):
            message = "is not empty, and nothing in it says that a compilation keeps its work there"
            raise UsageError(message, where=str(self.directory), hint="name a folder of its own")
        content = {
            "schema": _SCHEMA,
            "schema_version": _SCHEMA_VERSION,
            "identity": self._identity,
        }
        unfinished = self.directory / f"{_UNFINISHED}{_HEAD}"
        with disk_errors(self.directory):
            unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _flush(unfinished)
            unfinished.rename(head)
            _flush(self.directory)

    def _write(self, model: ir.Model, records: Sequence[PassRecord]) -> None:
        name = f"{len(records):03d}-{records[-1].name}"
        unfinished = self.directory / f"{_UNFINISHED}{name}"
        unfinished.mkdir()
        # Weights in the file of the graph would be in memory whole when it is read back.
        save_model(model, unfinished / _MODEL, progress=SilentProgress(), external_data=True)
        text = json.dumps([asdict(record) for record in records])
        (unfinished / _RECORDS).write_text(text, encoding="utf-8")
        for file in unfinished.iterdir():
            _flush(file)
        _flush(unfinished)
        older = self._checkpoints()
        unfinished.rename(self.directory / name)
        _flush(self.directory)
        for folder in older:
            # The weights of the running compilation may still lie where it went on.
            if folder != self._resumed:
                shutil.rmtree(folder)

    def _checkpoints(self) -> list[Path]:
        return sorted(file.parent for file in self.directory.glob(f"[0-9]*-*/{_RECORDS}"))


def _locked(directory: Path) -> int:
    descriptor = lock_folder(directory)
    if descriptor is None:
        message = "another compilation is using the folder"
        raise UsageError(message, where=str(directory), hint="wait for it, or stop it")
    return descriptor


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_head(head: Path) -> dict[str, Any]:
    try:
        content = json.loads(head.read_text(encoding="utf-8"))
        known = content["schema"] == _SCHEMA and content["schema_version"] == _SCHEMA_VERSION
        identity = content["identity"] if known else None
    except (OSError, ValueError, KeyError, TypeError):
        identity = None
    if isinstance(identity, dict):
        return identity
    message = "does not say whose work the folder holds, in a form that this version knows"
    raise UsageError(message, where=str(head), hint="remove the folder, or name another")


def _require_same(there: dict[str, Any], here: dict[str, Any], directory: Path) -> None:
    before, now = dict(_flat(there)), dict(_flat(here))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not names:
        return
    shown = "; ".join(
        f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}"
        for name in names[:_FIELDS_SHOWN]
    )
    more = f"; {len(names) - _FIELDS_SHOWN} more" if len(names) > _FIELDS_SHOWN else ""
    message = f"holds the work of another compilation: {shown}{more}"
    hint = "compile as before to go on, or name another folder"
    raise UsageError(message, where=str(directory), hint=hint)


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _VALUE_SHOWN else f"{text[:_VALUE_SHOWN]}..."


def _record(content: Mapping[str, Any]) -> PassRecord:
    return PassRecord(
        content["name"],
        Stage(content["stage"]),
        Numerics(content["numerics"]),
        content["seconds"],
        tuple(map(_rewrite, content["rewrites"])),
        tuple(Skip(**entry) for entry in content["skips"]),
    )


def _rewrite(content: Mapping[str, Any]) -> Rewrite:
    return WindowRewrite(**content) if "window" in content else Rewrite(**content)
