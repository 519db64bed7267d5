"""Finished windows in a folder, so that a run that was stopped can go on.

The folder holds `fingerprint.json`; `start/00012.npz`, the codes that learning began with, one
file for each weight; and for every finished window `00003.npz` with codes and scales that no later
window changes, `00003.carried.npz` with what the next one goes on from (the newest only), and
`00003.json` with its record, written last. Scales are float32, which holds all that is stored.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.errors import UsageError
from qcompiler.ir.dataflow import all_graphs, all_nodes
from qcompiler.ir.provenance import FLOAT_MS, QUANTIZED_MS
from qcompiler.ir.weights import disk_errors, read_all
from qcompiler.reconstruction.starting_point import StartingPoint, edges
from qcompiler.rewriting.window_record import WindowRewrite
from qcompiler.team import Team

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

_FINGERPRINT: Final = "fingerprint.json"
_START: Final = "start"
_MEASURED: Final = (FLOAT_MS, QUANTIZED_MS)
"""What is another number each time."""


class Checkpoint:
    """A folder of finished windows of one model, its samples and options."""

    def __init__(self, folder: Path, facts: Mapping[str, str]) -> None:
        """Open the folder, or make it.

        Args:
            folder: The folder.
            facts: What its contents depend on, by what a message calls it.

        Raises:
            UsageError: It was begun with other facts, holds something else, or cannot be written.
        """
        self._folder = folder
        path = folder / _FINGERPRINT
        with disk_errors(folder):
            if path.exists():
                _compare(folder, path, facts)
                return
            if folder.exists() and any(folder.iterdir()):
                message = "the folder holds something else than finished windows"
                raise UsageError(message, where=str(folder), hint="name an empty or a new one")
            (folder / _START).mkdir(parents=True, exist_ok=True)
            _write(path, (json.dumps(dict(facts), indent=2) + "\n").encode())

    def has_start(self, count: int) -> bool:
        """Whether the codes that learning begins with are there, of so many weights."""
        return all(self._start(index).exists() for index in range(count))

    def put_start(self, index: int, arrays: Arrays) -> None:
        """Keep what a weight begins with."""
        self._save(self._start(index), arrays)

    def start(self, index: int) -> Arrays:
        """Return what a weight begins with."""
        return self._load(self._start(index))

    def finished(self) -> list[WindowRewrite]:
        """Return the records of the finished windows, in order."""
        found: list[WindowRewrite] = []
        while (path := self._window(len(found), ".json")).exists():
            found.append(WindowRewrite(**json.loads(path.read_text(encoding="utf-8"))))
        return found

    def put(self, record: WindowRewrite, written: Arrays, carried: Arrays) -> None:
        """Keep a finished window.

        Args:
            record: What became of it.
            written: Codes and scales that stay.
            carried: What the next window goes on from.
        """
        index = record.window
        self._save(self._window(index, ".npz"), written)
        self._save(self._window(index, ".carried.npz"), carried)
        text = json.dumps(dataclasses.asdict(record), indent=2) + "\n"
        with disk_errors(self._folder):
            _write(self._window(index, ".json"), text.encode())
            self._window(index - 1, ".carried.npz").unlink(missing_ok=True)

    def written(self, index: int) -> Arrays:
        """Return codes and scales that a window left behind."""
        return self._load(self._window(index, ".npz"))

    def carried(self, index: int) -> Arrays:
        """Return what the window after this one goes on from; only of the last finished one."""
        return self._load(self._window(index, ".carried.npz"))

    def _start(self, index: int) -> Path:
        return self._folder / _START / f"{index:05}.npz"

    def _window(self, index: int, suffix: str) -> Path:
        return self._folder / f"{index:05}{suffix}"

    def _save(self, path: Path, arrays: Arrays) -> None:
        with disk_errors(self._folder):
            new = path.with_suffix(".new")
            with new.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            new.replace(path)

    def _load(self, path: Path) -> Arrays:
        try:
            with np.load(path, allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
        except (OSError, ValueError) as error:
            message = f"{path.name} is damaged or missing"
            hint = "remove the folder, and begin again"
            raise UsageError(message, where=str(self._folder), hint=hint) from error


def _write(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


def shared_checkpoint(folder: Path, facts: Mapping[str, str], team: Team) -> Checkpoint:
    """Open a folder that several processes share; the leading one makes it.

    Raises:
        UsageError: As `Checkpoint`, or a process does not see what the leading one sees.
    """
    team.lead(lambda: Checkpoint(folder, facts))

    def opened() -> Checkpoint:
        path = folder / _FINGERPRINT
        if not path.exists():
            message = "the folder that the processes share cannot be seen by all of them"
            raise UsageError(message, where=str(folder), hint="write to a disk that all have")
        if team.rank and (other := _differing(path, facts)):
            message = f"process {team.rank} reads another {' and '.join(other)} than process 0"
            hint = "model and samples must be the same each time they are read"
            raise UsageError(message, hint=hint)
        return Checkpoint(folder, facts)

    return team.agree(opened)


def _differing(path: Path, facts: Mapping[str, str]) -> list[str]:
    known = json.loads(path.read_text(encoding="utf-8"))
    return [name for name in facts if known.get(name) != facts[name]]


def _compare(folder: Path, path: Path, facts: Mapping[str, str]) -> None:
    if other := _differing(path, facts):
        message = f"the folder holds windows of another {' and '.join(other)}"
        hint = "name another folder, or remove it to begin again"
        raise UsageError(message, where=str(folder), hint=hint)


def facts_of_run(
    start: StartingPoint, samples: Samples, options: Sequence[object]
) -> dict[str, str]:
    """Return what finished windows depend on.

    Args:
        start: The graph before any weight was rounded again.
        samples: The calls.
        options: Options with a `repr` that tells all that matters.
    """
    return {
        "model": _model_digest(start),
        "samples": samples.fingerprint(),
        "options": repr(list(options)),
    }


def _model_digest(start: StartingPoint) -> str:
    """Return a SHA-256 over both graphs: nodes, plans and contents of constants."""
    digest = hashlib.sha256()
    for model in (start.original, start.model):
        digest.update(repr(edges(model)).encode())
        for node in all_nodes(model):
            named: list[ir.Node | ir.Value] = [node, *node.outputs]
            for each in named:
                props = each.metadata_props.items()
                digest.update(repr(sorted(p for p in props if p[0] not in _MEASURED)).encode())
            for attribute in node.attributes.values():
                if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                    digest.update(ir.serde.serialize_attribute(attribute).SerializeToString())
        for graph in all_graphs(model):
            for name, value in graph.initializers.items():
                if value.const_value is not None:
                    digest.update(f"{name} {value.const_value.dtype}".encode())
                    digest.update(_content(value.const_value))
    return digest.hexdigest()


def _content(tensor: ir.TensorProtocol) -> bytes:
    if tensor.dtype is ir.DataType.STRING:
        return repr(tensor.numpy().tolist()).encode()
    array = np.ascontiguousarray(read_all(tensor))
    return array.tobytes()
