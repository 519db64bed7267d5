"""The file that measured latencies are kept in, so that a compilation can be repeated exactly."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Final

import onnxruntime

from qcompiler.errors import UsageError
from qcompiler.execution.latency import Timing
from qcompiler.ir.atomic_file import AtomicFile
from qcompiler.ir.weights import disk_errors

_SCHEMA: Final = "qcompiler-measurements"
_SCHEMA_VERSION: Final = 1
_LARGEST: Final = 64 << 20
"""Bytes of a file that is believed; an entry takes about 500."""
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of one stretch of graph.

    Attributes:
        what: The stretch, for people: its ops and the shapes of its inputs.
        machine: Where it was measured (`machine_name`), for people as well.
        timings: The timing of each variant by its name.
    """

    what: str
    machine: str
    timings: Mapping[str, Timing]


class Measurements:
    """Measurements by key, read from a file if there is one and kept there.

    Args:
        path: The file, which need not exist; None keeps nothing.

    Raises:
        UsageError: It cannot be read, or is something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._changed = False
        self._entries = {} if path is None or not path.exists() else _load(path)

    def get(self, key: str) -> Measurement | None:
        """Return what is known under a key."""
        return self._entries.get(key)

    def put(self, key: str, measurement: Measurement) -> None:
        """Keep a measurement."""
        self._entries[key] = measurement
        self._changed = True

    def save(self) -> None:
        """Write the file if there is anything new; it appears complete or not at all.

        Raises:
            UsageError: The folder cannot be written.
        """
        if self._path is None or not self._changed:
            return
        rows = {
            key: {
                "what": entry.what,
                "machine": entry.machine,
                "timings": {name: astuple(timing) for name, timing in entry.timings.items()},
            }
            for key, entry in self._entries.items()
        }
        content = {
            "schema": _SCHEMA,
            "schema_version": _SCHEMA_VERSION,
            "columns": ["milliseconds", "ratio", "low", "high"],
            "measurements": rows,
        }
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
        with disk_errors(self._path.absolute().parent), AtomicFile(self._path) as file:
            file.stream().write(text.encode())
            file.commit()
        self._changed = False


def machine_name(threads: int | None) -> str:
    """Return what latencies depend on beside the graph: runtime, processor and threads."""
    used = "default threads" if threads is None else f"{threads} threads"
    return (
        f"onnxruntime {onnxruntime.__version__}, {_processor()}, "
        f"{os.cpu_count() or 1} processors, {used}"
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _load(path: Path) -> dict[str, Measurement]:
    try:
        if path.stat().st_size > _LARGEST:
            raise _damaged(path, f"it has more than {_LARGEST} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise UsageError(message, where=str(path)) from error
    except _MALFORMED as error:
        raise _damaged(path, "it is no JSON") from error
    try:
        if (content["schema"], content["schema_version"]) != (_SCHEMA, _SCHEMA_VERSION):
            raise _damaged(path, f"it is not {_SCHEMA} of version {_SCHEMA_VERSION}")
        return {str(key): _measurement(row) for key, row in content["measurements"].items()}
    except _MALFORMED as error:
        raise _damaged(path, f"an entry is malformed ({error})") from error


def _measurement(row: Mapping[str, Any]) -> Measurement:
    timings = {str(name): _timing(numbers) for name, numbers in row["timings"].items()}
    return Measurement(str(row["what"]), str(row["machine"]), timings)


def _timing(numbers: list[Any]) -> Timing:
    timing = Timing(*(float(number) for number in numbers))
    if not all(isfinite(number) and number >= 0 for number in astuple(timing)):
        message = f"{numbers!r} is no timing"
        raise ValueError(message)
    return timing


def _damaged(path: Path, reason: str) -> UsageError:
    message = f"is no file of measurements, or a damaged one: {reason}"
    return UsageError(message, where=str(path), hint="remove it to measure again")
