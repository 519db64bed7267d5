"""What files of results say of the machine they were measured on: its kind, not its folders."""

import json
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_no_file_of_results_names_a_folder_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w./])/(?:work|root|home|tmp|usr|mnt)\b\S*", text)
