import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.calibration.calls import SampleOptions
from qcompiler.cli.main import main
from qcompiler.compile import compile_model
from qcompiler.errors import UsageError
from qcompiler.options import CalibrationOptions, CompileOptions, TaskOptions
from qcompiler.quant.islands import IslandBudget, IslandKind, IslandRequest, Saliency
from qcompiler.reproduce import reproduce

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"
SOURCE = EXAMPLE / "digits.onnx"
DATA = EXAMPLE / "calibration.npz"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile with every setting off its default."""
    options = CompileOptions(
        scheme="w8a8",
        exclude=("node_linear_2",),
        calibration=CalibrationOptions(str(DATA), outlier_channels=2),
        correct_bias=False,
        external_data=True,
        never_slower=False,
    )
    output = tmp_path_factory.mktemp("compiled") / "small.onnx"
    return compile_model(SOURCE, options, output=output).manifest_path


def edited(manifest: Path, folder: Path, **changes: Any) -> Path:
    content = json.loads(manifest.read_text())
    path = folder / "edited.manifest.json"
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_the_same_compilation_is_identical(manifest: Path) -> None:
    found = reproduce(manifest, SOURCE, CalibrationOptions(str(DATA)))
    assert found.identical
    assert found.differences == ()


def test_another_result_is_told_with_what_changed(manifest: Path, tmp_path: Path) -> None:
    content = json.loads(manifest.read_text())
    settings = {**content["settings"], "correct_bias": True}
    versions = {**content["versions"], "numpy": "1.0"}
    path = edited(manifest, tmp_path, settings=settings, versions=versions)
    found = reproduce(path, SOURCE, CalibrationOptions(str(DATA)))
    assert not found.identical
    assert found.found != found.expected
    assert found.differences == (f"numpy was 1.0 and is {np.__version__}",)


def test_another_model_is_refused(manifest: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes((manifest.parent / "small.onnx").read_bytes())
    data = manifest.parent / "small.onnx.data"
    (tmp_path / data.name).write_bytes(data.read_bytes())
    with pytest.raises(UsageError, match="not the model of the manifest"):
        reproduce(manifest, other, CalibrationOptions(str(DATA)))


def test_other_samples_are_refused(manifest: Path, tmp_path: Path) -> None:
    with np.load(DATA) as arrays:
        np.savez(tmp_path / "other.npz", **{name: arrays[name] * 2 for name in arrays})
    with pytest.raises(UsageError, match="not the samples of the manifest"):
        reproduce(manifest, SOURCE, CalibrationOptions(str(tmp_path / "other.npz")))


def test_missing_samples_are_asked_for(manifest: Path) -> None:
    with pytest.raises(UsageError, match="no samples were given"):
        reproduce(manifest, SOURCE)


def _task(path: Path, shift: int = 0) -> TaskOptions:
    """Write labelled images, and return them as a task."""
    with np.load(EXAMPLE / "test_data.npz") as arrays:
        labels = (arrays["label"][:24] + shift) % 10
        np.savez(path, image=arrays["image"][:24], labels=labels)
    return TaskOptions(str(path))


@pytest.mark.parametrize("alone", [True, False])
def test_what_was_made_for_a_task_is_identical(alone: bool, tmp_path: Path) -> None:
    task = _task(tmp_path / "task.npz")
    given = None if alone else CalibrationOptions(str(DATA))
    few = replace(task, samples=SampleOptions(max_samples=20))
    options = CompileOptions(
        scheme="w2a16:b32",
        task=few,
        calibration=given,
        islands=IslandRequest(Saliency.TACQ, IslandBudget(average_bits=3.6), IslandKind.COLUMN),
    )
    made = compile_model(SOURCE, options, output=tmp_path / "o.onnx")
    # How many samples are read, the manifest says.
    found = reproduce(made.manifest_path, SOURCE, given, task=task)
    assert found.identical
    assert found.differences == ()
    with pytest.raises(UsageError, match="no samples of it were given"):
        reproduce(made.manifest_path, SOURCE, given)
    other = _task(tmp_path / "other.npz", shift=1)
    with pytest.raises(UsageError, match="not the samples of the task"):
        reproduce(made.manifest_path, SOURCE, given, task=other)
    if alone:
        assert status("reproduce", made.manifest_path, SOURCE, "--task", task.source) == 0
    else:
        with pytest.raises(UsageError, match="was calibrated"):
            reproduce(made.manifest_path, SOURCE, task=task)


@pytest.mark.parametrize("settings", [{}, {"equalization": 3}])
def test_unknown_settings_are_refused(
    settings: dict[str, Any], manifest: Path, tmp_path: Path
) -> None:
    path = edited(manifest, tmp_path, settings={**settings, "calibration": None, "task": None})
    with pytest.raises(UsageError, match="none that this version knows"):
        reproduce(path, SOURCE)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "qcompiler-report"}'])
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UsageError, match="manifest"):
        reproduce(tmp_path / "m.json", SOURCE)


def test_the_command_exits_with_the_verdict(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("reproduce", manifest, SOURCE, "--calibration", DATA) == 0
    assert "identical: sha256" in capsys.readouterr().out
    content = json.loads(manifest.read_text())
    output = {**content["output"], "sha256": "0" * 64}
    path = edited(manifest, tmp_path, output=output)
    assert status("reproduce", path, SOURCE, "--calibration", DATA) == 5
    assert "different: sha256" in capsys.readouterr().out


def status(*arguments: object) -> int:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    signal.signal(signal.SIGTERM, handler)
    return int(stop.value.code or 0)
