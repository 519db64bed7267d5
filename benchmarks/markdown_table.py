"""Tables of results as Markdown, and the sentence that says what they were measured with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.results_file import processor_of

MISSING = "-"


def measured_with(content: Mapping[str, Any]) -> list[str]:
    """Return what was measured with, on what and by which commands, as lines."""
    machine = content["machine"]
    present = [name for name, found in machine["instruction_sets"].items() if found]
    absent = [name for name, found in machine["instruction_sets"].items() if not found]
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    records = content["models"].values()
    processors = {facts.get("processor") for each in records for facts in each["arms"].values()}
    others = sorted(processors - {None, processor_of(machine)})
    elsewhere = ["", f"Some on {' and on '.join(others)}: see each in the JSON file."]
    return [
        f"Measured with {versions}, on {machine['processor']} ({machine['cores']} cores, "
        f"{', '.join(present) or 'no vector extensions'}; without {', '.join(absent)}), 2 threads, "
        "by:",
        "",
        *(f"    {command}" for command in content["commands"]),
        *(elsewhere if others else []),
    ]


def made_with(
    content: Mapping[str, Any], name: Callable[[str], str] = lambda arm: arm
) -> list[str]:
    """Return the versions that arms were made with, once each, as lines.

    Args:
        content: What a results file holds.
        name: What an arm is called here; arms of one name are one.
    """
    found: dict[str, list[str]] = {}
    for record in content["models"].values():
        for arm, facts in record["arms"].items():
            if versions := facts.get("made_with"):
                text = ", ".join(f"{package} {number}" for package, number in versions.items())
                if name(arm) not in (arms := found.setdefault(text, [])):
                    arms.append(name(arm))
    return [f"- {', '.join(f'`{each}`' for each in arms)}: {text}" for text, arms in found.items()]


def table(rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a table with a row per arm; columns that no row fills are left out.

    Args:
        rows: Column -> cell, per arm; columns come in the order in which rows name them.
    """
    columns = [
        column
        for column in dict.fromkeys(column for cells in rows.values() for column in cells)
        if any(cells.get(column, MISSING) != MISSING for cells in rows.values())
    ]
    lines = [_line(["arm", *columns]), _line(["---"] + ["---:"] * len(columns))]
    for name, cells in rows.items():
        lines.append(_line([f"`{name}`", *(cells.get(column, MISSING) for column in columns)]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
