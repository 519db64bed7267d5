"""What the command lines of benchmarks have in common."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.results_file import FOLDER


def benchmark_parser(text: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's text, as it is written."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=text, formatter_class=raw)


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add how much is scored, what is left out, and where results go."""
    parser.add_argument("--quick", action="store_true", help="Score on fewer items.")
    parser.add_argument("--resume", action="store_true", help="Leave out what is measured.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="Where results go.")


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add where large weights lie while one thing is measured, and where its facts go."""
    help_text = "Where weights are written for the time being."
    parser.add_argument("--folder", type=Path, help=help_text)
    parser.add_argument("--json", type=Path, help="Where facts are written, if anywhere.")


def add_names(parser: argparse.ArgumentParser, option: str, known: Sequence[str]) -> None:
    """Add an option that takes some of the known names, with commas between them; all if none."""
    parser.add_argument(option, type=_names_of(known), default=list(known), metavar="A,B")


def command_line() -> list[str]:
    """Return what was typed, the program by its name alone."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        # Names may hold commas: the longest that begins the rest is meant.
        rest, names = text, []
        while rest:
            fits = [name for name in known if rest == name or rest.startswith(f"{name},")]
            if not fits:
                message = f"unknown: {rest}; known: {'; '.join(known)}"
                raise argparse.ArgumentTypeError(message)
            names.append(max(fits, key=len))
            rest = rest[len(names[-1]) + 1 :]
        return names

    return parse
