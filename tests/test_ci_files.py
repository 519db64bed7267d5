"""The pipeline files and docs/ci.md: what they run is run here, on the shipped example."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qcompiler.compile import compile_model
from qcompiler.options import CompileOptions

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that docs/ci.md speaks of, and `qcompile` beside it."""
    folder = tmp_path_factory.mktemp("ci")
    shutil.copy(DIGITS / "digits.onnx", folder / "base.onnx")
    shutil.copy(DIGITS / "test_data.npz", folder / "test.npz")
    options = CompileOptions(scheme="w8a16", inspect_kernels=False)
    compile_model(folder / "base.onnx", options, output=folder / "candidate.onnx")
    tools = folder / "bin"
    tools.mkdir()
    script = tools / "qcompile"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qcompiler.cli "$@"\n')
    script.chmod(0o755)
    return folder


def _run(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def _blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def _yaml(key: str) -> Any:
    (found,) = (content for b in _blocks("yaml") if key in (content := yaml.safe_load(b)))
    return found[key]


def _action(folder: Path, given: dict[str, str], **variables: str) -> Any:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    assert given.keys() <= action["inputs"].keys()
    required = {name for name, entry in action["inputs"].items() if entry["required"]}
    assert required <= given.keys()
    inputs = {name: entry.get("default", "") for name, entry in action["inputs"].items()} | given
    *_, install, check = action["runs"]["steps"]
    assert install["run"] == 'python -m pip install "$GITHUB_ACTION_PATH"'
    filled = {
        name: inputs[re.fullmatch(r"\$\{\{ inputs\.([\w-]+) \}\}", text)[1]]  # type: ignore[index]
        for name, text in check["env"].items()
    }
    return _run(check["run"], folder, **filled, **variables)


def test_the_action_passes_a_good_model(workplace: Path) -> None:
    (step,) = (s for s in _yaml("jobs")["model"]["steps"] if "qcompiler@" in s["uses"])
    done = _action(workplace, step["with"], GITHUB_STEP_SUMMARY=str(workplace / "summary.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gate passed" in done.stdout
    assert "candidate.onnx passed" in (workplace / "summary.md").read_text()
    assert (workplace / "qcompile-gate.xml").exists()


def test_the_action_stops_a_bad_model(workplace: Path) -> None:
    given = {"base": "base.onnx", "candidate": "candidate.onnx", "data": "test.npz"}
    done = _action(workplace, given | {"gate": "min-sqnr=200"}, GITHUB_ACTIONS="true")
    assert done.returncode == 5
    assert "::error title=qcompile min_sqnr of logits::" in done.stdout
    assert "::warning title=qcompile suspect 1" in done.stdout


def test_commands_of_the_guide_run(workplace: Path) -> None:
    first, second, container = _blocks("bash")
    # Timings of a busy machine are no part of this test.
    done = _run(first.replace("max-latency=1.2", "max-latency=20"), workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    done = _run(second.replace("-o candidate", "-o other"), workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    entry = re.search(r'ENTRYPOINT \["(\w+)"\]', _blocks("dockerfile")[0])
    assert entry is not None
    arguments = container.partition(" qcompiler check ")[2]
    done = _run(f"{entry[1]} check {arguments}", workplace)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_python_of_the_guide_runs(workplace: Path) -> None:
    (text,) = _blocks("python")
    (workplace / "gate.py").write_text(text)
    done = _run(f'"{sys.executable}" gate.py', workplace)
    assert done.stdout == "True []\n", done.stderr


def test_the_recipe_of_the_guide_is_a_gate(workplace: Path) -> None:
    (text,) = _blocks("toml")
    (workplace / "gate.toml").write_text(text)
    done = _run("qcompile check base.onnx candidate.onnx --gate gate.toml", workplace)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gitlab_job_runs(workplace: Path) -> None:
    install, *script = _yaml("model-gate")["script"]
    assert install == "pip install qcompiler"
    done = _run("\n".join(script), workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (workplace / _yaml("model-gate")["artifacts"]["reports"]["junit"]).exists()


def test_the_pre_commit_hook_runs(workplace: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    (used,) = _yaml("repos")[0]["hooks"]
    assert used["id"] == hook["id"]
    assert hook["pass_filenames"] is False
    done = _run(f"{hook['entry']} {shlex.join(used['args'])}", workplace)
    assert done.returncode == 0, done.stdout + done.stderr
