"""Making an arm's model in a process of its own, in the interpreter that its quantizer is in."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.int8_arms import THREADS
from benchmarks.int8_peers import Peer, Task
from benchmarks.measured_process import run_measured

_ROOT = Path(__file__).parent.parent
_GIB = 1 << 30

Facts = dict[str, Any]


def make_model(program: str, task: Task, arm: Peer, arguments: argparse.Namespace) -> Facts:
    """Make an arm's model; return what it was made with and what it took.

    Args:
        program: The module that makes models, such as `benchmarks.int8_arms`.
        task: What is made, and where it goes.
        arm: How.
        arguments: What the options of `add_process_options` said.

    Returns:
        `compile` (`seconds`, `peak_bytes`), `made_with`, and `failure` if there is no model.
    """
    interpreters: Mapping[str, Path] = dict(arguments.peer_python)
    python = interpreters.get(arm.family, Path(sys.executable))
    command = [str(python), "-m", program]
    command += [str(task.source), str(task.calls), str(task.output), str(arm)]
    command += ["--transformer"] * task.transformer
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(_ROOT)}
    outcome = run_measured(
        command,
        environment,
        folder=task.output.parent,
        memory_limit=int(arguments.memory_limit * _GIB),
        time_limit=arguments.time_limit,
    )
    took = {"seconds": outcome.seconds, "peak_bytes": outcome.peak_bytes}
    if outcome.returncode:
        return {"failure": outcome.last_complaint, "compile": took}
    facts: Facts = json.loads(outcome.stdout.splitlines()[-1])
    if "failure" not in facts and not task.output.exists():
        facts["failure"] = "wrote no model"
    return facts | {"compile": took}


def add_process_options(parser: argparse.ArgumentParser, families: Sequence[str]) -> None:
    """Add the options that say where peers are installed and what they may take."""
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        type=_peer_python(families),
        metavar="NAME=PATH",
        help=f"interpreter that has a peer ({', '.join(families)}) installed; this one by default",
    )
    parser.add_argument("--memory-limit", type=float, default=12.0, help="GiB; ends a quantizer")
    parser.add_argument("--time-limit", type=float, default=1800.0, help="seconds; the same")


def choice(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what reads a list of names with commas between them, all of them known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            message = f"no such name: {', '.join(unknown)}; there are {', '.join(known)}"
            raise argparse.ArgumentTypeError(message)
        return names

    return parse


def _peer_python(families: Sequence[str]) -> Callable[[str], tuple[str, Path]]:
    def parse(text: str) -> tuple[str, Path]:
        name, _, path = text.partition("=")
        if name not in families or not path:
            message = f"{text} is not NAME=PATH with a NAME of {', '.join(families)}"
            raise argparse.ArgumentTypeError(message)
        if not Path(path).is_file():
            message = f"there is no {path}"
            raise argparse.ArgumentTypeError(message)
        # Not resolved: the link is what makes an interpreter one of a virtual environment.
        return name, Path(path).absolute()

    return parse
