"""`qcompile sensitivity`."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler.cli.main import main
from qcompiler.quant.recipe import Recipe
from tests.support.sensitive import SENSITIVE, sensitive_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Run the command on the model; gives exit status, standard output and error."""
    model = tmp_path / "model.onnx"
    ir.save(sensitive_model(), model)
    calibrate = ("--calibration", "random:3", "--observer", "min-max")
    common = (*calibrate, "--outlier-channels", "0", "--two-terms-below", "0")

    def call(command: str, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([command, str(model), *common, *(str(argument) for argument in arguments)])
        text = capsys.readouterr()
        return int(stop.value.code or 0), text.out, text.err

    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)


def test_a_table_and_a_recipe(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("sensitivity", "--top", 2, "-o", tmp_path / "r.toml", "--mode", "exact")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["rank", "node", "op", "scheme", "dB", "share", "KL"]
    assert lines[1].split()[:3] == ["1", SENSITIVE, "MatMul"]
    assert "all 4 together" in lines[3]
    assert "spares 2 of 4 ops" in lines[4]
    recipe = Recipe.from_toml(tmp_path / "r.toml")
    assert recipe.rules[0].selector.name == SENSITIVE
    assert len(recipe.rules) == 2


def test_json(run: Run) -> None:
    status, out, _ = run("sensitivity", "--report", "json")
    assert status == 0
    assert len(json.loads(out)["ops"]) == 4


def test_a_recipe_needs_a_number(run: Run, tmp_path: Path) -> None:
    status, _, err = run("sensitivity", "-o", tmp_path / "r.toml")
    assert status == 2
    assert "--top N or --min-output-sqnr DB" in err
    assert not (tmp_path / "r.toml").exists()
    assert run("sensitivity", "--top", 1, "--min-output-sqnr", 20)[0] == 2


def test_compile_with_a_bound(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    arguments = ("compile", "-o", path, "--no-never-slower", "--report", "json")
    status, out, _ = run(*arguments, "--min-output-sqnr", 25)
    assert status == 0
    reasons = {node["name"]: node["reason"] for node in json.loads(out)["nodes"]}
    assert reasons[SENSITIVE].startswith("left out of w8a8 by --min-output-sqnr 25")
    path.unlink()
    status, _, err = run(*arguments, "--min-output-sqnr", 150)
    assert status == 5
    assert "still have" in err
    assert not path.exists()
