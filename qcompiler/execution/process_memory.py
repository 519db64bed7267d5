"""What processes take of memory: this one, and one that does nothing but run a model."""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from qcompiler.errors import TargetError
from qcompiler.execution import memory_probe
from qcompiler.execution.sessions import Array

_SECONDS: Final = 600


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes.

    Linux keeps it in VmHWM; `getrusage` there also counts what the parent held before `exec`.
    """
    try:
        return memory_probe.status_bytes("VmHWM")
    except (OSError, StopIteration, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def memory_to_run(
    model: Path,
    feeds: Mapping[str, Array],
    *,
    threads: int | None = None,
    custom_op_libraries: Sequence[Path] = (),
) -> int:
    """Load and run a model in a process of its own, and return what that took, in bytes.

    It is the peak of resident memory above what Python, ONNX Runtime and the inputs take. ONNX
    Runtime runs the model twice with all optimizations.

    Args:
        model: The model.
        feeds: A value for every input.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        custom_op_libraries: Shared libraries with the kernels of custom operators.

    Raises:
        TargetError: The model cannot be loaded or run there.
    """
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        inputs = Path(folder) / "inputs.npz"
        with inputs.open("wb") as file:
            arrays: dict[str, Any] = {f"x{i}": v for i, v in enumerate(feeds.values())}
            np.savez(file, **arrays)
        request = {
            "model": str(model.absolute()),
            "inputs": str(inputs),
            "names": list(feeds),
            "threads": threads or 0,
            "libraries": [str(path.absolute()) for path in custom_op_libraries],
        }
        answer = _probe(model, json.dumps(request))
    try:
        return int(json.loads(answer.stdout)["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        last = answer.stderr.strip().splitlines()[-1:] or [f"exit status {answer.returncode}"]
        message = f"the process that measures memory failed: {last[0]}"
        raise TargetError(message, where=str(model)) from error


def _probe(model: Path, request: str) -> subprocess.CompletedProcess[str]:
    # As a file and with -P: its folder must not be searched for modules.
    try:
        return subprocess.run(
            [sys.executable, "-P", str(memory_probe.__file__)],
            input=request,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        message = f"the process that measures memory did not end in {_SECONDS} seconds"
        raise TargetError(message, where=str(model)) from error
