"""How much memory the process took at most."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes.

    Linux keeps it in VmHWM; `getrusage` there also counts what the parent held before `exec`.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
