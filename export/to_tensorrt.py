"""Building TensorRT and TensorRT-RTX engines from a lowered model, in a process of their own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from qcompiler.errors import TargetError, UsageError
from qcompiler.export import tensorrt_worker
from qcompiler.export.checked_file import refuse_unwritable
from qcompiler.export.tensorrt_profiles import ShapeRange
from qcompiler.ir.weights import disk_errors
from qcompiler.progress import Advance, Progress, SilentProgress

_WATCH_SECONDS: Final = 0.1
_SHOWN: Final = 5
_LONGEST: Final = 400
"""Characters of a message of the library that are shown."""
_KILLED: Final = -signal.SIGKILL


@dataclass(frozen=True, slots=True)
class EngineLibrary:
    """What differs between TensorRT and TensorRT-RTX: names; their API is one.

    Attributes:
        module: What is imported.
        title: What messages call it.
        extra: The extra of this package that installs it.
        names_processors: Whether it builds for processors that are named, rather than for that of
            the machine.
    """

    module: str
    title: str
    extra: str
    names_processors: bool = False


LIBRARIES: Final[Mapping[str, EngineLibrary]] = MappingProxyType(
    {
        "tensorrt": EngineLibrary("tensorrt", "TensorRT", "tensorrt"),
        "tensorrt-rtx": EngineLibrary(
            "tensorrt_rtx", "TensorRT-RTX", "tensorrt-rtx", names_processors=True
        ),
    }
)
"""By the name of the target that builds with it."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is built. Names of flags, pools and levels are those of the library's API.

    Attributes:
        library: Name in `LIBRARIES`.
        profile: Shapes of dynamic inputs, by name.
        capabilities: Processors the engine is for, such as "SM89"; none is that of the machine.
            TensorRT-RTX alone builds for others, and needs no GPU for it.
        flags: Builder flags to set: REFIT, STRIP_PLAN, WEIGHT_STREAMING, VERSION_COMPATIBLE ...
        pools: Bytes that memory pools may take: WORKSPACE ...
        optimization_level: 0 to 5; None is the library's own.
        hardware_compatibility: AMPERE_PLUS ...; None is none.
        timing_cache: A file of timings that is read if it exists, and written.
        memory_limit: Bytes that the building process may hold in memory; None is no limit. It is
            watched where the system has `/proc`.
        python: The interpreter that has the library; None is this one.
    """

    library: str = "tensorrt-rtx"
    profile: Mapping[str, ShapeRange] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    pools: Mapping[str, int] = field(default_factory=dict)
    optimization_level: int | None = None
    hardware_compatibility: str | None = None
    timing_cache: Path | None = None
    memory_limit: int | None = None
    python: Path | None = None


@dataclass(frozen=True, slots=True)
class EngineFile:
    """An engine that was built.

    Attributes:
        path: The file.
        size: Its bytes.
        seconds: What the library took, parsing included.
        layers: Layers of the network before the library fused any.
        version: Of the library.
        warnings: What the library warned of, each text once.
    """

    path: Path
    size: int
    seconds: float
    layers: int
    version: str
    warnings: tuple[str, ...]


def capability_of(text: str) -> str:
    """Return the library's name of a processor: "86", "8.6" and "sm_86" are SM86.

    Raises:
        UsageError: It is none of these.
    """
    digits = text.strip().lower().removeprefix("sm").lstrip("_").replace(".", "")
    if not digits.isdecimal() or not 2 <= len(digits) <= 3:
        message = f"--sm {text!r} is no compute capability"
        raise UsageError(message, hint="write --sm 86,89")
    return f"SM{digits}"


def require_library(options: EngineOptions) -> None:
    """Raise UsageError where the library of an engine is missing, before any work is done.

    What another interpreter has shows when the engine is built.
    """
    if options.library not in LIBRARIES:
        message = f"no library for engines is called {options.library!r}"
        raise UsageError(message, hint=f"there are {', '.join(LIBRARIES)}")
    library = LIBRARIES[options.library]
    if options.python is None and find_spec(library.module) is None:
        message = f"{library.title} is not installed, so no engine can be built"
        raise UsageError(message, hint=f"pip install 'qcompiler[{library.extra}]'")


def build_engine(
    model: Path, output: Path, options: EngineOptions, *, progress: Progress | None = None
) -> EngineFile:
    """Build an engine from a strongly typed ONNX model.

    The library runs in a process of its own: what crashes there is an error here. The engine
    appears complete or not at all.

    Args:
        model: The model; external data lies beside it.
        output: The engine.
        options: How it is built.
        progress: Shows the library's own phases.

    Raises:
        UsageError: The library is not installed, has no such flag, or the output cannot be
            written.
        TargetError: The library refuses the model, fails or crashes, or takes too much memory;
            `where` is the node, where it names one.
    """
    require_library(options)
    refuse_unwritable(output)
    library = LIBRARIES[options.library]
    with (
        disk_errors(output.absolute().parent),
        tempfile.TemporaryDirectory(prefix=".qcompile-engine-", dir=output.absolute().parent) as at,
    ):
        made = Path(at) / "engine"
        request = Path(at) / "request.json"
        request.write_text(json.dumps(_request(model, made, options, library)), encoding="utf-8")
        outcome = _run(request, options, progress or SilentProgress())
        if outcome.done is None:
            raise _failure(outcome, options, library)
        made.replace(output)
    done = outcome.done
    return EngineFile(
        output,
        int(done["bytes"]),
        float(done["seconds"]),
        int(done["layers"]),
        str(done["version"]),
        tuple(dict.fromkeys(outcome.warnings)),
    )


def _request(
    model: Path, made: Path, options: EngineOptions, library: EngineLibrary
) -> dict[str, Any]:
    cache = options.timing_cache
    return {
        "library": library.module,
        "model": str(model.absolute()),
        "output": str(made),
        "profile": {name: shapes.as_lists() for name, shapes in options.profile.items()},
        "values": {name: shapes.values for name, shapes in options.profile.items()},
        "capabilities": list(options.capabilities),
        "flags": list(options.flags),
        "pools": dict(options.pools),
        "optimization_level": options.optimization_level,
        "hardware_compatibility": options.hardware_compatibility,
        "timing_cache": None if cache is None else str(cache.absolute()),
    }


@dataclass(slots=True)
class _Outcome:
    """What the process said until it ended.

    Attributes:
        done: Its last event, where it wrote an engine.
        errors: Its error events.
        logged: Errors of the library's log.
        warnings: Warnings of that log.
        status: Exit status; negative is the signal that ended it.
        tail: The last line on standard error.
        too_large: Whether it was stopped for its memory.
    """

    done: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    status: int = 0
    tail: str = ""
    too_large: bool = False

    def take(self, event: Mapping[str, Any]) -> None:
        """Keep an event that is no progress."""
        if event["event"] == "done":
            self.done = dict(event)
        elif event["event"] == "error":
            self.errors.append(dict(event))
        elif event["event"] == "log":
            known = self.warnings if event["severity"] == "warning" else self.logged
            known.append(str(event["text"]))


def _run(request: Path, options: EngineOptions, progress: Progress) -> _Outcome:
    """Run the building process to its end."""
    outcome = _Outcome()
    command = [str(options.python or sys.executable), tensorrt_worker.__file__, str(request)]
    with tempfile.TemporaryFile() as errors, _Phases(progress) as phases:
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
            _watched(process, options.memory_limit, outcome),
        ):
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                if not phases.take(event):
                    outcome.take(event)
        outcome.status = process.returncode
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").strip().splitlines()
        outcome.tail = lines[-1] if lines else ""
    if outcome.status:
        outcome.done = None
    return outcome


@contextmanager
def _watched(
    process: subprocess.Popen[bytes], limit: int | None, outcome: _Outcome
) -> Iterator[None]:
    """End the process when it holds too much memory, or when this one is interrupted."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_WATCH_SECONDS):
            if limit is not None and _resident_bytes(process.pid) > limit:
                outcome.too_large = True
                process.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
        ended.set()
        watcher.join()


def _resident_bytes(pid: int) -> int:
    """Return what a process holds in memory; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def _failure(
    outcome: _Outcome, options: EngineOptions, library: EngineLibrary
) -> UsageError | TargetError:
    """Return what went wrong as an error."""
    if outcome.too_large:
        limit = (options.memory_limit or 0) >> 20
        message = f"building the engine took more than {limit} MiB"
        return TargetError(message, hint="raise the limit, or build with less workspace")
    stage = outcome.errors[0]["stage"] if outcome.errors else ""
    if stage == "import":
        message = f"{library.title} cannot be imported: {outcome.errors[0]['text']}"
        return UsageError(message, hint=f"pip install 'qcompiler[{library.extra}]'")
    if stage in ("options", "profile"):
        hint = "profiles come from --calibration, or --profile input:1x16..8x128..64x512"
        return UsageError(str(outcome.errors[0]["text"]), hint=hint if stage == "profile" else None)
    if stage == "parse":
        return _parse_failure(outcome, library)
    said = "; ".join(dict.fromkeys(outcome.logged[:_SHOWN])) or outcome.tail
    if outcome.status < 0:
        message = f"{library.title} crashed with {_signal_name(outcome.status)}: {said}"
    else:
        message = f"{library.title} cannot build the engine: {said}"
    return TargetError(message, hint="exclude the ops it names, or try another scheme for them")


def _signal_name(status: int) -> str:
    if status == _KILLED:
        return "SIGKILL (the system may be out of memory)"
    return signal.Signals(-status).name


def _parse_failure(outcome: _Outcome, library: EngineLibrary) -> TargetError:
    nodes = list(dict.fromkeys(str(error["node"]) for error in outcome.errors if error["node"]))
    texts = [
        f"{error['node']} ({error['op']}): {' '.join(error['text'].split())[:_LONGEST]}"
        for error in outcome.errors
    ]
    message = f"{library.title} does not take the model: {'; '.join(texts[:_SHOWN])}"
    if len(texts) > _SHOWN:
        message += f"; and {len(texts) - _SHOWN} more"
    return TargetError(
        message, where=nodes[0] if nodes else None, hint="exclude these ops, or change the export"
    )


class _Phases(AbstractContextManager["_Phases"]):
    """Shows the outermost phases of the library as tasks."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._open: dict[str, tuple[AbstractContextManager[Advance], Advance]] = {}
        self._left: dict[str, int] = {}

    def take(self, event: Mapping[str, Any]) -> bool:
        """Show an event; returns whether it was one of a phase."""
        kind, name = event["event"], str(event.get("phase"))
        if kind == "phase":
            self._left[name] = max(1, int(event["steps"]))
            task = self._progress.task(f"engine: {name}", self._left[name])
            self._open[name] = task, task.__enter__()
        elif kind == "step" and self._left.get(name, 0):
            self._left[name] -= 1
            self._open[name][1](1)
        elif kind == "finish" and name in self._open:
            task, advance = self._open.pop(name)
            # Libraries skip steps: what a phase has left is done when it ends.
            advance(self._left.pop(name))
            task.__exit__(None, None, None)
        return kind in ("phase", "step", "finish")

    def __exit__(self, *exception: object) -> None:
        while self._open:
            self._open.popitem()[1][0].__exit__(None, None, None)
