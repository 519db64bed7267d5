"""Equalization in a whole compilation: planted outliers are undone, and nothing else changes."""

import json
import signal
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from benchmarks.planted import JITTER, plant_outliers, redraw_rounding
from qcompiler.cli.main import main
from tests.support.graphs import random_array
from tests.support.parity import run_model

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "digits.onnx"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "planted.onnx"
    assert plant_outliers(DIGITS, path) > 3
    return path


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls")
    for seed in range(6):
        images = np.abs(random_array(8, 1, 8, 8, seed=seed)).clip(0, 1)
        np.savez(folder / f"{seed}.npz", **{_input_name(): images})  # type: ignore[arg-type]
    return folder


def _input_name() -> str:
    return str(onnx.load(DIGITS).graph.input[0].name)


def run(arguments: list[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    signal.signal(signal.SIGTERM, handler)
    assert not stop.value.code


def compiled(model: Path, calls: Path, folder: Path, *options: str) -> dict[str, object]:
    """Compile through the command line, every pass verified by running, and return the report."""
    output = folder / "out.onnx"
    arguments = [
        *("compile", str(model), "-o", str(output), "--scheme", "w8a8"),
        *("--calibration", str(calls), "--no-never-slower", "--verify", "numerics", *options),
    ]
    run(arguments)
    report: dict[str, object] = json.loads(output.with_suffix(".report.json").read_text())
    return report


def decibels(report: dict[str, object]) -> float:
    calibration = report["calibration"]
    assert isinstance(calibration, dict)
    return float(calibration["outputs"][0]["emulated_db"])


def test_planting_changes_nothing(planted: Path, calls: Path) -> None:

    for path in sorted(calls.glob("*.npz")):
        feeds = dict(np.load(path))
        outputs = [run_model(ir.load(each), feeds) for each in (DIGITS, planted)]
        for name, values in outputs[0].items():
            assert outputs[1][name] == pytest.approx(values, abs=1e-4 * float(np.abs(values).max()))


def test_redrawing_changes_weights_a_little_and_nothing_else(calls: Path, tmp_path: Path) -> None:
    drawn = [tmp_path / f"{seed}.onnx" for seed in (1, 2)]
    for seed, path in enumerate(drawn, start=1):
        assert redraw_rounding(DIGITS, path, seed) > 3
    feeds = dict(np.load(min(calls.glob("*.npz"))))
    expected, *others = (run_model(ir.load(each), feeds) for each in (DIGITS, *drawn))
    for found in others:
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, abs=1e-4 * float(np.abs(values).max()))
    one, other = (_largest_weight(path) for path in drawn)
    assert not np.array_equal(one, other)
    assert other == pytest.approx(one, rel=5 * JITTER)


def _largest_weight(path: Path) -> npt.NDArray[np.float32]:
    weights = [numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    return max(weights, key=lambda weight: weight.size)


def test_planted_outliers_are_undone(planted: Path, calls: Path, tmp_path: Path) -> None:
    plain = decibels(compiled(planted, calls, tmp_path, "--equalize", "none"))
    report = compiled(planted, calls, tmp_path)
    clean = decibels(compiled(DIGITS, calls, tmp_path, "--equalize", "none"))
    assert decibels(report) > plain + 6
    assert decibels(report) > clean - 2
    nodes = report["nodes"]
    assert isinstance(nodes, list)
    assert any(str(node["equalized"]).startswith("by ") for node in nodes)
    assert "equalized-outputs" in rules_of(report)


def rules_of(report: dict[str, object]) -> list[str]:
    """Return the rules that `equalize-channels` applied or refused by."""
    passes = report["passes"]
    assert isinstance(passes, list)
    (record,) = [each for each in passes if each["name"] == "equalize-channels"]
    return [each["rule"] for each in (*record["changes"], *record["skips"])]


def test_the_check_can_be_left_out(planted: Path, calls: Path, tmp_path: Path) -> None:
    report = compiled(planted, calls, tmp_path, "--no-equalize-check")
    assert "equalized-outputs" not in rules_of(report)


def test_the_default_is_never_worse_than_without(calls: Path, tmp_path: Path) -> None:
    for scheme in ("w8a8", "w4a16", "w3a16:b32"):
        plain = compiled(DIGITS, calls, tmp_path, "--scheme", scheme, "--equalize", "none")
        assert decibels(compiled(DIGITS, calls, tmp_path, "--scheme", scheme)) >= decibels(plain)


def test_without_equalization_the_pass_does_not_run(calls: Path, tmp_path: Path) -> None:
    report = compiled(DIGITS, calls, tmp_path, "--equalize", "none")
    passes = report["passes"]
    assert isinstance(passes, list)
    assert "equalize-channels" not in [record["name"] for record in passes]


def test_a_recipe_chooses_the_method(calls: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('version = 1\ndefault = "w8a8"\nequalize = "aweq"\n')
    output = tmp_path / "out.onnx"
    arguments = ["compile", str(DIGITS), "-o", str(output), "--recipe", str(recipe)]
    run([*arguments, "--calibration", str(calls), "--no-never-slower"])
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert any("by aweq" in str(node["equalized"]) for node in report["nodes"])


def test_weights_alone_use_samples_too(calls: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    arguments = ["compile", str(DIGITS), "-o", str(output), "--scheme", "w4a16:b32"]
    run([*arguments, "--calibration", str(calls)])
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert "equalize-channels" in [record["name"] for record in report["passes"]]


def test_the_pass_runs_alone(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dumped = tmp_path / "dumped"
    compiling = ["compile", str(DIGITS), "-o", str(tmp_path / "out.onnx"), "--scheme", "w4a16"]
    run([*compiling, "--dump-ir", str(dumped)])
    (assigned,) = dumped.glob("*assign-schemes.onnx")
    alone = ["run-pass", "equalize-channels", str(assigned), "-o", str(tmp_path / "alone.onnx")]
    run([*alone, "--scheme", "w4a16", "--calibration", str(calls)])
    assert "equalize-channels" in capsys.readouterr().out
