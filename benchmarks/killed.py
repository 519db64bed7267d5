"""Kills compilations at random moments, lets them go on, and compares the bytes.

    python -m benchmarks.killed                 50 moments, over the arms below
    python -m benchmarks.killed --moments 10

Each time: a compilation with a work folder is killed with SIGKILL at a random moment, what it left
is looked at, and the same command runs to its end. It counts where the output has the bytes of an
undisturbed run, and no half artefact lay there between.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.int8_workloads import INT8_WORKLOADS, write_calls

_MODEL = "cifar_cnn"
_ARMS: dict[str, tuple[str, ...]] = {
    "w4a16:b128": ("--scheme", "w4a16:b128"),
    "w8a8": ("--scheme", "w8a8", "--calibration", "calls", "--measurements", "latency.json"),
    "w3a16:b128 gptq": (
        *("--scheme", "w3a16:b128", "--calibration", "calls", "--reconstruct", "gptq"),
    ),
    "w3a16:b128 cbq": (
        *("--scheme", "w3a16:b128", "--calibration", "calls", "--reconstruct", "cbq"),
        *("--steps", "20"),
    ),
}


def command(source: Path, arm: str) -> list[str]:
    """Return the command line of an arm, to be run in the folder of its files."""
    common = (str(source), "-o", "out.onnx", "--work-dir", "work", "--external-data")
    return [sys.executable, "-m", "qcompiler.cli", "compile", *common, *_ARMS[arm]]


def digest(folder: Path) -> str:
    """Return a hash over the compiled model, its weights and its manifest."""
    found = hashlib.sha256()
    for name in ("out.onnx", "out.onnx.data", "out.manifest.json"):
        found.update((folder / name).read_bytes())
    return found.hexdigest()


def finish(arguments: Sequence[str], folder: Path) -> float:
    """Run a compilation to its end; return the seconds it took."""
    begin = time.perf_counter()
    subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - begin


def kill(arguments: Sequence[str], folder: Path, after: float) -> None:
    """Start a compilation in a group of its own, and kill the group after so many seconds."""
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def left(folder: Path) -> list[str]:
    """Return the artefacts in a folder."""
    return sorted(file.name for file in folder.glob("out.*"))


def clear(folder: Path) -> None:
    """Remove the artefacts."""
    for file in folder.glob("out.*"):
        file.unlink()


def try_moment(arguments: Sequence[str], folder: Path, after: float, expected: str) -> str:
    """Kill and go on; return "" where all is well, else what is not."""
    clear(folder)
    kill(arguments, folder, after)
    found = left(folder)
    if "out.onnx" in found and digest(folder) != expected:
        return f"another model lay there: {found}"
    if found and "out.onnx" not in found:
        return f"half an artefact lay there: {found}"
    finish(arguments, folder)
    if digest(folder) != expected:
        return "other bytes"
    kept = [file.name for file in folder.iterdir() if file.name.startswith(".qcompile-")]
    return f"left over: {kept}" if kept else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return how many moments went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    generator = np.random.default_rng(chosen.seed)
    workload = INT8_WORKLOADS[_MODEL]
    source = workload.task.build()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "calls").mkdir()
        write_calls(folder / "calls", workload.samples())
        lines = {arm: command(source, arm) for arm in _ARMS}
        expected, seconds = {}, {}
        for arm, line in lines.items():
            # The first run measures latencies, the second uses them like all others.
            finish(line, folder)
            seconds[arm] = finish(line, folder)
            expected[arm] = digest(folder)
        for index in range(chosen.moments):
            arm = list(_ARMS)[index % len(_ARMS)]
            after = float(generator.uniform(0, seconds[arm]))
            fault = try_moment(lines[arm], folder, after, expected[arm])
            faults += bool(fault)
            print(
                f"{index + 1}: {arm} after {after:.1f} of {seconds[arm]:.1f} s: {fault or 'same'}"
            )
            sys.stdout.flush()
    print(f"{chosen.moments - faults} of {chosen.moments} the same")
    return faults


if __name__ == "__main__":
    sys.exit(main())
