"""The int8 settings that are compared, ours and the peers', and a program that makes one model.

    python -m benchmarks.int8_arms SOURCE CALLS OUTPUT ARM [--transformer]

runs in the interpreter that the quantizer is installed for, and prints as JSON what it was made
with, or why it was not made.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from benchmarks.int8_peers import PEERS, Peer, Task

if TYPE_CHECKING:
    from qcompiler.options import CalibrationOptions

THREADS = 2
NOT_INSTALLED = "not installed"
"""How the failure of an arm begins whose quantizer is absent."""
_NEEDED = ("onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "torch")


@dataclass(frozen=True, slots=True)
class Ours:
    """A setting of qcompiler.

    Attributes:
        scheme: Text form of the scheme.
        observer: How activation ranges are chosen; None is the compiler's default.
        calibrated: Whether the scheme needs samples.
    """

    scheme: str
    observer: str | None = None
    calibrated: bool = True

    family: ClassVar[str] = "qcompiler"
    module: ClassVar[str] = "qcompiler"
    distribution: ClassVar[str] = "qcompiler"
    requirement: ClassVar[str] = "-e ."

    def __str__(self) -> str:
        return self.scheme if self.observer is None else f"{self.scheme}/{self.observer}"

    def quantize(self, task: Task) -> None:
        """Make the model."""
        from qcompiler import CompileOptions, compile_model

        options = CompileOptions(scheme=self.scheme, workers=THREADS)
        if self.calibrated:
            options = CompileOptions(
                scheme=self.scheme, workers=THREADS, calibration=self._calibration(task)
            )
        compile_model(task.source, options, output=task.output)

    def _calibration(self, task: Task) -> "str | CalibrationOptions":
        from qcompiler.calibration.observers import Observer
        from qcompiler.options import CalibrationOptions

        if self.observer is None:
            return str(task.calls)
        return CalibrationOptions(str(task.calls), observer=Observer(self.observer))


OURS = (
    Ours("w8a8"),
    *(Ours("w8a8", observer) for observer in ("min-max", "percentile", "mse", "entropy")),
    Ours("w8a8-dynamic", calibrated=False),
)
_ALL: tuple[Peer, ...] = (*OURS, *PEERS)
ARMS: dict[str, Peer] = {str(arm): arm for arm in _ALL}


def make(task: Task, arm: Peer) -> dict[str, object]:
    """Make a model.

    Returns:
        `made_with`, versions of what made it; or `failure`, a sentence.
    """
    if not _is_installed(arm.module):
        return {"failure": f"{NOT_INSTALLED}: pip install {arm.requirement}"}
    try:
        arm.quantize(task)
    # Whatever a peer raises is a result of the benchmark.
    except Exception as error:
        traceback.print_exc()
        text = "".join(traceback.format_exception_only(error)).strip()
        return {"failure": text.splitlines()[-1], "made_with": _versions(arm)}
    return {"made_with": _versions(arm)}


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _versions(arm: Peer) -> dict[str, str]:
    found = {}
    for name in dict.fromkeys((arm.distribution, *_NEEDED)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arms: Mapping[str, Peer] = ARMS) -> None:
    """Make one model with one of some settings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("calls", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("arm", choices=list(arms), metavar="ARM")
    parser.add_argument("--transformer", action="store_true")
    arguments = parser.parse_args()
    task = Task(arguments.source, arguments.calls, arguments.output, arguments.transformer)
    # Some peers print their progress, one of them from C++.
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with redirect_stdout(sys.stderr):
        facts = make(task, arms[arguments.arm])
    with os.fdopen(answer, "w") as stream:
        stream.write(json.dumps(facts))


if __name__ == "__main__":
    main()
