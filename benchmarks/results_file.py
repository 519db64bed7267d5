"""The JSON file that measurements are collected in, and what they were measured with."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("qcompiler", "onnxruntime", "onnx", "onnx-ir", "numpy", "torch")
_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimd", "i8mm")
_PLACES = ("--peer-python", "--results", "--folder", "--cache-dir")
"""Options that say where things are on a machine, each with a word of its own or behind =."""


@cache
def versions() -> dict[str, str]:
    """Return the versions of what decides results; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return what latency depends on: processor, its instruction sets, cores, memory."""
    model, flags = platform.machine(), ""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            model = value if key == "model name" else model
            flags = value if key in {"flags", "Features"} else flags
    present = set(flags.split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model,
        "instruction_sets": {flag: flag in present for flag in _FLAGS},
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": platform.system(),
    }


def processor_of(found: Mapping[str, Any]) -> str:
    """Return a machine's processor with the instruction sets that it has."""
    present = [name for name, has in found["instruction_sets"].items() if has]
    return f"{found['processor']} ({', '.join(present) or 'no vector extensions'})"


class Results:
    """The results file, read if it exists and written after every measurement.

    Attributes:
        content: What is in the file.
        path: The JSON file.
        markdown: Where the table goes.
    """

    def __init__(
        self, command: Sequence[str], folder: Path = FOLDER, name: str = "weight_only"
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / f"{name}.json"
        self.markdown = folder / f"{name}.md"
        self.content: dict[str, Any] = {"commands": [], "models": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
        self.content.setdefault("machine", machine())
        self.content["versions"] = versions()
        text = " ".join(_without_places(command))
        if text and text not in self.content["commands"]:
            self.content["commands"].append(text)

    @property
    def models(self) -> dict[str, Any]:
        """What is known of each model."""
        models: dict[str, Any] = self.content["models"]
        return models

    def model(self, name: str) -> dict[str, Any]:
        """Return a model's record: `float`, and `arms` by name."""
        record: dict[str, Any] = self.models.setdefault(name, {"float": {}, "arms": {}})
        return record

    def arm(self, model: str, arm: str) -> dict[str, Any]:
        """Return what is known of an arm; empty if nothing is."""
        record: dict[str, Any] = self.model(model)["arms"].get(arm, {})
        return record

    def put(self, model: str, arm: str, facts: dict[str, Any]) -> None:
        """Record an arm with the processor it was measured on, and write the file."""
        self.model(model)["arms"][arm] = {**facts, "processor": processor_of(machine())}
        self.write()

    def take_over(self, other: Mapping[str, Any]) -> None:
        """Take arms and commands from another file's content; what is there of both is replaced."""
        processor = processor_of(other["machine"])
        for name, record in other["models"].items():
            own = self.model(name)
            own["float"] = own["float"] or record["float"]
            own["arms"] |= {
                arm: {"processor": processor, **facts} for arm, facts in record["arms"].items()
            }
        commands = self.content["commands"]
        commands += [command for command in other["commands"] if command not in commands]

    def write(self) -> None:
        """Write the file; a killed run leaves the last whole one."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        new.replace(self.path)


def write_facts(facts: Mapping[str, Any], path: Path | None) -> None:
    """Print the facts of one measurement, and write them with what they were measured on."""
    print(json.dumps(facts), flush=True)
    if path is not None:
        content = {"machine": machine(), "versions": versions(), **facts}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _without_places(words: Sequence[str]) -> list[str]:
    """Return a command without what says where things are on the machine it ran on."""
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before not in _PLACES and word.partition("=")[0] not in _PLACES
    ]
