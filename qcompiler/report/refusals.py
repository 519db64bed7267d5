"""What refusals mean and how out of them: the catalogue that documentation and reports share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

PAGE: Final = "docs/refusals.md"
_ENTRY: Final = re.compile(
    r"^### `(?P<reason>[a-z0-9-]+)`\n\n(?P<meaning>.+?)\n\n"
    r"\*\*Way out:\*\* (?P<way_out>.+?)\n(?=\n|\Z)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One entry.

    Attributes:
        reason: The rule or reason, which is also its anchor.
        meaning: What happened, and why it does.
        way_out: What to do about it.
    """

    reason: str
    meaning: str
    way_out: str

    @property
    def anchor(self) -> str:
        """Where the documentation has it."""
        return f"{PAGE}#{self.reason}"


@cache
def catalogue() -> Mapping[str, Refusal]:
    """Return all entries by reason, in the order of the page."""
    text = (files("qcompiler.report") / "assets" / "refusals.md").read_text(encoding="utf-8")
    entries = (
        Refusal(match["reason"], _line(match["meaning"]), _line(match["way_out"]))
        for match in _ENTRY.finditer(text)
    )
    return {entry.reason: entry for entry in entries}


def meaning_of_rule(rule: str) -> Refusal | None:
    """Return the entry of a rule by which an op stays in float; recipes' own rules share one."""
    entries = catalogue()
    own = rule.startswith(("rule", "--exclude", "recipe default", "sensitivity"))
    return entries.get(rule) or (entries["recipe"] if own else None)


def _line(text: str) -> str:
    return " ".join(text.replace("`", "").split())
