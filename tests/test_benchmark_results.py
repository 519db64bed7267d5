"""What files of results say of the machine they were measured on: its kind, not its folders."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.merge_results import merge
from benchmarks.results_file import FOLDER, Results

FILES = sorted(FOLDER.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--folder", "/some/where"],
        ["--results=/some/where"],
        ["--peer-python", "nncf=/some/where/bin/python", "--peer-python=onnxsim=/some/python"],
    ],
)
def test_commands_are_recorded_without_places(words: list[str], tmp_path: Path) -> None:
    command = ["python -m benchmarks.static_int8", *words, "--models", "minilm"]
    results = Results(command, tmp_path, "static_int8")
    results.write()
    written = json.loads((tmp_path / "static_int8.json").read_text(encoding="utf-8"))
    assert written["commands"] == ["python -m benchmarks.static_int8 --models minilm"]


def _written(folder: Path, processor: str, arms: dict[str, float]) -> Path:
    results = Results(["command", processor], folder, "reconstruction")
    results.content["machine"] |= {"processor": processor, "instruction_sets": {"avx2": True}}
    results.model("cifar_cnn")["float"] = {"score": 80.0}
    facts = {arm: {"score": score, "seconds": 60.0} for arm, score in arms.items()}
    results.model("cifar_cnn")["arms"] |= facts
    results.write()
    return results.path


def test_results_of_several_machines_are_merged(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "all")]
    one = _written(folders[0], "one", {"w4a4 gptq seed 0": 1.0, "w4a4 nearest seed 0": 2.0})
    two = _written(folders[1], "two", {"w4a4 gptq seed 0": 3.0})
    merge("reconstruction", [one], folders[2])
    merge("reconstruction", [two], folders[2])
    merged = json.loads((folders[2] / "reconstruction.json").read_text(encoding="utf-8"))
    arms = merged["models"]["cifar_cnn"]["arms"]
    assert {name: (facts["score"], facts["processor"]) for name, facts in arms.items()} == {
        "w4a4 gptq seed 0": (3.0, "two (avx2)"),
        "w4a4 nearest seed 0": (2.0, "one (avx2)"),
    }
    assert merged["machine"]["processor"] == "one"
    assert merged["commands"] == ["command one", "command two"]
    table = (folders[2] / "reconstruction.md").read_text(encoding="utf-8")
    assert "Some on two (avx2): see each" in table
    assert "3.00, 1.0 min" in table


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_no_file_of_results_names_a_folder_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w./])/(?:work|root|home|tmp|usr|mnt)\b\S*", text)
