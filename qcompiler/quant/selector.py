"""Which nodes a rule of a recipe is about, by name, op type, block or place in the graph."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from qcompiler.errors import UsageError

_LARGEST_BLOCK = 100_000
"""Above any model's block count: a slip such as `0-99999999` must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Selector:
    """Which nodes a rule is about; every part that is given must hold.

    Attributes:
        name: Glob on the node name, or `/regex/`; both match the whole name, with case.
        op_type: ONNX op type.
        blocks: Block indices, ascending.
        between: Two value names: nodes on a path from the first to the second.
    """

    name: str | None = None
    op_type: str | None = None
    blocks: tuple[int, ...] | None = None
    between: tuple[str, str] | None = None

    def matches_name(self, name: str) -> bool:
        """Whether a node of this name can be meant; true where the selector has no name.

        A name always matches itself, whatever glob characters it holds (`layers[0]/MatMul`).
        """
        if self.name is None or self.name == name:
            return True
        if _is_regex(self.name):
            return re.fullmatch(self.name[1:-1], name) is not None
        return fnmatch.fnmatchcase(name, self.name)

    def __str__(self) -> str:
        parts = []
        if self.name is not None:
            parts.append(f"name={self.name}")
        if self.op_type is not None:
            parts.append(f"op_type={self.op_type}")
        if self.blocks is not None:
            parts.append(f"block={format_blocks(self.blocks)}")
        if self.between is not None:
            parts.append(f"between={self.between[0]}..{self.between[1]}")
        return " ".join(parts)


def parse_blocks(text: str, where: str) -> tuple[int, ...]:
    """Read block indices such as "0-3,7".

    Returns:
        The indices, ascending, each once.

    Raises:
        UsageError: A part is not an index or a rising range.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part, re.ASCII)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if match is None or last < first or last > _LARGEST_BLOCK:
            message = f"'block' is {text!r}, and {part.strip()!r} is not an index or a rising range"
            raise UsageError(message, where=where, hint='write block = "0-3,7"')
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def format_blocks(blocks: Sequence[int]) -> str:
    """Write block indices as `parse_blocks` reads them, runs as ranges."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] == block - 1:
            runs[-1][1:] = [block]
        else:
            runs.append([block])
    return ",".join("-".join(str(end) for end in run) for run in runs)


def check_pattern(pattern: str, where: str) -> None:
    """Refuse a name pattern that cannot be used.

    Raises:
        UsageError: It is empty, or a regular expression with a fault.
    """
    if not pattern:
        message = "the name pattern is empty"
        raise UsageError(message, where=where, hint="'*' matches all names")
    if _is_regex(pattern):
        try:
            re.compile(pattern[1:-1])
        except re.error as error:
            message = f"{pattern!r} is not a regular expression: {error}"
            raise UsageError(
                message,
                where=where,
                hint="a pattern between slashes is a regular expression; others are globs",
            ) from error


def nearest(name: str, candidates: Sequence[str], n: int = 3) -> list[str]:
    """Return up to `n` candidates that look most like `name`, best first.

    For messages about a name that matches nothing. Case and glob characters are ignored; a
    candidate that holds the name comes before one that only resembles it.
    """
    wanted = name.strip("/*").lower()
    known = list(dict.fromkeys(candidates))
    holding = [item for item in known if wanted and wanted in item.lower()]
    by_lower: dict[str, list[str]] = {}
    for item in known:
        by_lower.setdefault(item.lower(), []).append(item)
    close = get_close_matches(wanted, list(by_lower), n=n, cutoff=0.4)
    resembling = [item for lower in close for item in by_lower[lower]]
    return list(dict.fromkeys([*holding, *resembling]))[:n]


def _is_regex(pattern: str) -> bool:
    return len(pattern) > 2 and pattern.startswith("/") and pattern.endswith("/")
