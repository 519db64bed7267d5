"""Running a command and seeing what it takes: wall seconds, and memory of all its processes."""

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.05
_PROC = Path("/proc")
_KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended.

    Attributes:
        seconds: Wall seconds from start to end.
        peak_bytes: Most resident memory at any time: the larger of the process's own high-water
            mark and the sum over it and its children, sampled; 0 where there is no /proc.
        returncode: Its exit status; negative if a signal ended it.
        stdout: What it printed.
        stderr: What it complained about.
        stopped: Why it was killed, if it was.
    """

    seconds: float
    peak_bytes: int
    returncode: int
    stdout: str
    stderr: str
    stopped: str | None = None

    @property
    def last_complaint(self) -> str:
        """Why it failed: the reason it was killed, or the last line it wrote."""
        lines = self.stderr.strip().splitlines()
        return self.stopped or (lines[-1].strip() if lines else f"exit {self.returncode}")


def run_measured(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    folder: Path,
    memory_limit: int,
    time_limit: float,
) -> Outcome:
    """Run a command to its end, or until it exceeds a limit.

    Args:
        command: The program and its arguments.
        environment: All of its environment.
        folder: Where it runs.
        memory_limit: Bytes of resident memory at which it is killed.
        time_limit: Seconds after which it is killed.
    """
    peak, stopped = 0, None
    known: frozenset[int] = frozenset()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        with subprocess.Popen(
            command, stdout=out, stderr=errors, env=environment, cwd=folder
        ) as child:
            while child.poll() is None:
                tree = _tree(child.pid)
                # A child that was just forked still shows its parent's memory as its own.
                resident = sum(_status(pid, "VmRSS") for pid in tree if pid in known)
                peak = max(peak, resident, _status(child.pid, "VmHWM"))
                known = frozenset(tree)
                stopped = _excess(peak, memory_limit, time.perf_counter() - started, time_limit)
                if stopped is not None:
                    child.kill()
                    break
                _wait(child)
        seconds = time.perf_counter() - started
        out.seek(0)
        errors.seek(0)
        return Outcome(seconds, peak, child.returncode, out.read(), errors.read(), stopped)


def _wait(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(_SAMPLE_SECONDS)
    except subprocess.TimeoutExpired:
        return


def _excess(peak: int, memory_limit: int, seconds: float, time_limit: float) -> str | None:
    if peak > memory_limit:
        return f"stopped: took more than {memory_limit / 2**30:.3g} GiB of memory"
    if seconds > time_limit:
        return f"stopped: took more than {time_limit:.0f} s"
    return None


def _tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for each in found:
        for task in (_PROC / str(each) / "task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text(encoding="ascii").split()]
            except OSError:  # The process ended while it was looked at.
                continue
    return found


def _status(pid: int, field: str) -> int:
    """Return a memory field of a process's status in bytes; 0 if the process is gone."""
    try:
        lines = (_PROC / str(pid) / "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    values = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return _KIB * int(next(values, 0))
