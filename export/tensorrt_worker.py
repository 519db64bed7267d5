"""Builds one engine, in a process of its own: run as a script, by path.

It imports the standard library and TensorRT alone, so that it runs in any environment that has
TensorRT, and a crash of the library ends this process and no other. The request is a JSON file,
the first argument; events go to standard output, one JSON object a line. What the library itself
prints goes to standard error.

Types are those of TensorRT proper, and checked where its stubs are at hand (`tests/export`).
What TensorRT-RTX has beyond it is `_set_capabilities`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import tensorrt

Emit = Callable[[dict[str, Any]], None]

_SEVERITIES = ("internal error", "error", "warning", "info", "verbose")
_KEPT = 3
"""Severities below this number are handed on: info and verbose are not."""


class Library(Protocol):
    """What this process takes from a module of TensorRT."""

    __name__: str
    Builder: type[tensorrt.Builder]
    BuilderFlag: type[tensorrt.BuilderFlag]
    HardwareCompatibilityLevel: type[tensorrt.HardwareCompatibilityLevel]
    ILogger: type[tensorrt.ILogger]
    IProgressMonitor: type[tensorrt.IProgressMonitor]
    MemoryPoolType: type[tensorrt.MemoryPoolType]
    NetworkDefinitionCreationFlag: type[tensorrt.NetworkDefinitionCreationFlag]
    OnnxParser: type[tensorrt.OnnxParser]


class BuildFailedError(Exception):
    """The library refused; what it said was emitted before."""


def main() -> int:
    """Build what the request asks for; 0 where an engine was written."""
    emit = _own_output()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        library: Any = importlib.import_module(request["library"])
    except (ImportError, OSError) as error:
        emit({"event": "error", "stage": "import", "text": str(error)})
        return 1
    try:
        _build(library, library.__version__, request, emit)
    except BuildFailedError:
        return 1
    return 0


def _own_output() -> Emit:
    """Keep standard output for events: what the library prints goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        stream.write(json.dumps(event) + "\n")
        stream.flush()

    return emit


def _build(library: Library, version: str, request: dict[str, Any], emit: Emit) -> None:
    started = time.perf_counter()
    builder = library.Builder(_logger(library, emit))
    network = builder.create_network(_network_flags(library))
    _parse(library, network, request, builder.logger, emit)
    config = _config(library, builder, network, request, emit)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        emit({"event": "error", "stage": "build", "text": "no engine was made"})
        raise BuildFailedError
    with Path(request["output"]).open("wb") as stream:
        stream.write(plan)
    _keep_timing_cache(config, request)
    emit(
        {
            "event": "done",
            "bytes": plan.nbytes,
            "seconds": time.perf_counter() - started,
            "layers": network.num_layers,
            "version": version,
        }
    )


def _network_flags(library: Library) -> int:
    """Return the flag of strong typing; a library without it types strongly anyway."""
    flag = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(
    library: Library,
    network: tensorrt.INetworkDefinition,
    request: dict[str, Any],
    logger: tensorrt.ILogger,
    emit: Emit,
) -> None:
    parser = library.OnnxParser(network, logger)
    # By path, since external data lies beside the model.
    if parser.parse_from_file(request["model"]):
        return
    for index in range(parser.num_errors):
        _tell(parser.get_error(index), emit)
    raise BuildFailedError


def _tell(error: tensorrt.ParserError, emit: Emit) -> None:
    node, op = error.node_name(), error.node_operator()
    emit({"event": "error", "stage": "parse", "node": node, "op": op, "text": error.desc()})


def _config(
    library: Library,
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    request: dict[str, Any],
    emit: Emit,
) -> tensorrt.IBuilderConfig:
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(library, emit)
    for name in request["flags"]:
        config.set_flag(_member(library.BuilderFlag, name, emit))
    for name, size in request["pools"].items():
        config.set_memory_pool_limit(_member(library.MemoryPoolType, name, emit), size)
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    if request["hardware_compatibility"] is not None:
        levels = library.HardwareCompatibilityLevel
        config.hardware_compatibility_level = _member(
            levels, request["hardware_compatibility"], emit
        )
    _set_capabilities(library, config, request["capabilities"], emit)
    _set_timing_cache(config, request)
    _add_profile(builder, config, network, request, emit)
    return config


def _set_capabilities(library: Any, config: Any, names: list[str], emit: Emit) -> None:
    """Name the processors that an engine is for; TensorRT-RTX alone can be told."""
    if not names:
        return
    if not hasattr(library, "ComputeCapability"):
        text = "builds for the processor of this machine alone: leave --sm out"
        emit({"event": "error", "stage": "options", "text": f"{library.__name__} {text}"})
        raise BuildFailedError
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        capability = _member(library.ComputeCapability, name, emit)
        config.set_compute_capability(capability, index)


def _member(kind: Any, name: str, emit: Emit) -> Any:
    members = kind.__members__
    if name not in members:
        known = ", ".join(members)
        text = f"{kind.__name__} has no {name}; there are {known}"
        emit({"event": "error", "stage": "options", "text": text})
        raise BuildFailedError
    return members[name]


def _set_timing_cache(config: tensorrt.IBuilderConfig, request: dict[str, Any]) -> None:
    path = request["timing_cache"]
    if path is not None:
        data = Path(path).read_bytes() if Path(path).exists() else b""
        config.set_timing_cache(config.create_timing_cache(data), ignore_mismatch=False)


def _keep_timing_cache(config: tensorrt.IBuilderConfig, request: dict[str, Any]) -> None:
    if request["timing_cache"] is None:
        return
    cache = config.get_timing_cache()
    if cache is not None:
        path = Path(request["timing_cache"])
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_bytes(memoryview(cache.serialize()))
        scratch.replace(path)


def _add_profile(
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    network: tensorrt.INetworkDefinition,
    request: dict[str, Any],
    emit: Emit,
) -> None:
    """Say between which shapes dynamic inputs vary, and which values decide shapes."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    profile = builder.create_optimization_profile()
    wanted = False
    for value in inputs:
        # Sequences of integers, by way of conversions that stubs do not know.
        shape: Any = value.shape
        if value.is_shape_tensor:
            place = profile.set_shape_input
            found, kind = request["values"].get(value.name), "values"
        elif -1 in tuple(shape):
            place = profile.set_shape
            found, kind = request["profile"].get(value.name), "shape"
        else:
            continue
        wanted = True
        if not found:
            text = f"input {value.name} has shape {tuple(shape)}, and no profile says "
            text += f"which {kind} it takes"
            emit({"event": "error", "stage": "profile", "text": text})
            raise BuildFailedError
        try:
            three: list[Any] = [tuple(numbers) for numbers in found]
            place(value.name, *three)
        except (RuntimeError, ValueError, TypeError) as error:
            text = f"input {value.name} of shape {tuple(shape)}: {error}"
            emit({"event": "error", "stage": "profile", "text": text})
            raise BuildFailedError from error
    if wanted:
        config.add_optimization_profile(profile)


def _logger(library: Library, emit: Emit) -> tensorrt.ILogger:
    base: Any = library.ILogger

    class Logger(base):  # type: ignore[misc]
        """Hands warnings and errors on."""

        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            level = int(severity)
            if level < _KEPT:
                emit({"event": "log", "severity": _SEVERITIES[level], "text": text})

    made: tensorrt.ILogger = Logger()
    return made


def _monitor(library: Library, emit: Emit) -> tensorrt.IProgressMonitor:
    base: Any = library.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        """Hands the steps of outermost phases on."""

        def __init__(self) -> None:
            base.__init__(self)
            self._outer: set[str] = set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._outer.add(phase_name)
                emit({"event": "phase", "phase": phase_name, "steps": num_steps})

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._outer:
                emit({"event": "step", "phase": phase_name, "step": step})
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._outer:
                self._outer.discard(phase_name)
                emit({"event": "finish", "phase": phase_name})

    made: tensorrt.IProgressMonitor = Monitor()
    return made


if __name__ == "__main__":
    sys.exit(main())
