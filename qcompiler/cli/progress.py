"""Progress on a terminal as bars, elsewhere as a line every few seconds."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from qcompiler.progress import Advance, Progress

_SECONDS_BETWEEN_LINES = 5.0


class BarProgress:
    """Shows every task as a bar with its remaining time."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        """Show a bar until the task ends."""
        task = self._bars.add_task(description, total=total)
        try:
            yield lambda amount: self._bars.advance(task, amount)
        finally:
            self._bars.remove_task(task)


class LineProgress:
    """Prints where the innermost task is, at most every five seconds; quick runs print nothing."""

    def __init__(self) -> None:
        self._tasks: list[list[float | str]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._print_until_stopped, daemon=True)

    def start(self) -> None:
        """Begin to watch the tasks."""
        self._thread.start()

    def stop(self) -> None:
        """End watching."""
        self._stop.set()
        self._thread.join()

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        """Watch a task until it ends."""
        entry: list[float | str] = [description, 0.0, total, time.monotonic()]
        self._tasks.append(entry)

        def advance(amount: float) -> None:
            entry[1] = float(entry[1]) + amount

        try:
            yield advance
        finally:
            self._tasks.remove(entry)

    def _print_until_stopped(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_LINES):
            if self._tasks:
                click.echo(_line(self._tasks[-1]), err=True)


def _line(entry: list[float | str]) -> str:
    description, done, total, started = entry[0], float(entry[1]), float(entry[2]), float(entry[3])
    elapsed = time.monotonic() - started
    share = done / total if total else 0.0
    left = f", {elapsed * (1 - share) / share:.0f} s left" if share > 0 else ""
    return f"{description}: {share:.0%} after {elapsed:.0f} s{left}"


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """Show progress on standard error, in the form that suits it."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            yield BarProgress(bars)
        return
    lines = LineProgress()
    lines.start()
    try:
        yield lines
    finally:
        lines.stop()
