"""Run as a program: loads a model, runs it twice, and writes what memory that took.

It reads a request from standard input as JSON and imports nothing but NumPy and ONNX Runtime, so
that what it measures is the model's.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

_SILENT = 4


def status_bytes(key: str) -> int:
    """Return an entry of /proc/self/status in bytes.

    Raises:
        OSError, StopIteration, ValueError: The system has no such entry.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _resident() -> int:
    """Return what is resident now, and begin a new peak where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return status_bytes("VmRSS")
    except (OSError, StopIteration, ValueError):
        return _peak()


def _peak() -> int:
    try:
        return status_bytes("VmHWM")
    except (OSError, StopIteration, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _measure(request: dict[str, Any]) -> int:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = request["threads"]
    for library in request["libraries"]:
        options.register_custom_ops_library(library)
    with np.load(request["inputs"], allow_pickle=False) as file:
        feeds = {name: file[f"x{index}"] for index, name in enumerate(request["names"])}
    before = _resident()
    session = onnxruntime.InferenceSession(
        request["model"], options, providers=["CPUExecutionProvider"]
    )
    floats = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    for value in session.get_inputs():
        if value.type in floats and value.name in feeds:
            feeds[value.name] = feeds[value.name].astype(floats[value.type])
    for _ in range(2):
        session.run(None, feeds)
    return max(0, _peak() - before)


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"bytes": _measure(json.load(sys.stdin))}))
