"""Weights rounded for what they compute, in a whole compilation."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.cli.main import main
from qcompiler.quant.ranges import sqnr_db
from qcompiler.reconstruction import reconstruction
from tests.support.graphs import random_array
from tests.support.parity import run_model

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "digits.onnx"


def images(seed: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    name = ir.load(DIGITS).graph.inputs[0].name or ""
    return {name: np.abs(random_array(16, 1, 8, 8, seed=seed)).clip(0, 1)}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls")
    for seed in range(6):
        np.savez(folder / f"{seed}.npz", **images(seed))  # type: ignore[arg-type]
    return folder


def status(*arguments: object) -> int:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    signal.signal(signal.SIGTERM, handler)
    return int(stop.value.code or 0)


def noise_db(path: Path) -> float:
    """Return the SQNR of a compiled model's output on images that calibrated nothing."""
    feeds = images(99)
    truth, found = (run_model(ir.load(each), feeds) for each in (DIGITS, path))
    (name,) = truth
    wide = truth[name].astype(np.float64)
    return sqnr_db(float((wide**2).sum()), float(((found[name] - wide) ** 2).sum()))


@pytest.mark.parametrize("scheme", ["w3a16:b32", "w2a16:b32"])
def test_gptq_leaves_outputs_nearer(scheme: str, calls: Path, tmp_path: Path) -> None:
    found = {}
    for method in ("none", "gptq"):
        path = tmp_path / f"{method}.onnx"
        common = ("compile", DIGITS, "-o", path, "--scheme", scheme, "--equalize", "none")
        assert status(*common, "--calibration", calls, "--reconstruct", method) == 0
        found[method] = noise_db(path)
    assert found["gptq"] > found["none"] + 1
    report = json.loads((tmp_path / "gptq.report.json").read_text())
    names = [record["name"] for record in report["passes"]]
    assert "round-weights" in names
    assert "insert-qdq" not in names


def test_cbq_leaves_outputs_nearer_than_gptq(calls: Path, tmp_path: Path) -> None:
    found = {}
    for method in ("gptq", "cbq"):
        path = tmp_path / f"{method}.onnx"
        common = ("compile", DIGITS, "-o", path, "--scheme", "w2a16:b32", "--equalize", "none")
        assert status(*common, "--calibration", calls, "--reconstruct", method) == 0
        found[method] = noise_db(path)
    assert found["cbq"] > found["gptq"] + 0.5
    report = json.loads((tmp_path / "cbq.report.json").read_text())
    names = [record["name"] for record in report["passes"]]
    assert "reconstruct-blocks" in names
    assert not {"insert-qdq", "round-weights"} & set(names)
    assert report["windows"]
    for window in report["windows"]:
        assert window["kept"] == (window["loss_after"] < window["loss_before"])
        assert 0 <= window["flipped"] <= window["codes"]
        assert window["seconds"] > 0
        assert window["peak_bytes"] > 0


def test_finished_windows_are_taken_up(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a second window leaves the first, and the bytes are those of a whole run."""
    options = ("--scheme", "w3a16:b32", "--calibration", calls, "--reconstruct", "cbq")
    steps = ("--steps", 8, "--window", 1, "--reconstruct-preset", "fast")
    common = ("compile", DIGITS, *options, *steps)
    assert status(*common, "-o", tmp_path / "whole.onnx") == 0
    begun: list[None] = []

    def stop_in_the_second(*_: object) -> None:
        begun.append(None)
        if len(begun) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(reconstruction, "forget_peak", stop_in_the_second)
    work = ("-o", tmp_path / "again.onnx", "--work-dir", tmp_path / "work")
    assert status(*common, *work) == 130
    assert (tmp_path / "work" / "windows").is_dir()
    assert status(*common, *work) == 0
    windows = json.loads((tmp_path / "again.report.json").read_text())["windows"]
    assert len(begun) == len(windows) + 1
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("method", ["gptq", "cbq"])
def test_the_same_command_gives_the_same_bytes(method: str, calls: Path, tmp_path: Path) -> None:
    made = []
    for run in range(2):
        path = tmp_path / f"{run}.onnx"
        options = ("--scheme", "w4a16:b32", "--calibration", calls, "--reconstruct", method)
        assert status("compile", DIGITS, "-o", path, *options) == 0
        made.append(path.read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("method", ["gptq", "cbq"])
def test_int8_activations_are_quantized_too(method: str, calls: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    options = ("--scheme", "w8a8", "--calibration", calls, "--reconstruct", method)
    assert status("compile", DIGITS, "-o", path, *options, "--no-never-slower") == 0
    assert noise_db(path) > 25


def test_samples_are_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("compile", DIGITS, "--reconstruct", "gptq", "-o", tmp_path / "x.onnx") == 2
    assert "needs samples" in capsys.readouterr().err


def _two_processes(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "qcompiler.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def test_two_processes_share_the_windows(calls: Path, tmp_path: Path) -> None:
    options = ("--scheme", "w2a16:b32", "--calibration", calls, "--reconstruct", "cbq")
    common = (
        DIGITS,
        *options,
        "--steps",
        12,
        "--calls-per-step",
        2,
        "--reconstruct-preset",
        "fast",
    )
    assert status("compile", *common, "-o", tmp_path / "one.onnx") == 0
    done = _two_processes(*common, "-o", tmp_path / "two.onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 2, "one process speaks"
    one, two = (
        json.loads((tmp_path / f"{name}.report.json").read_text())["windows"]
        for name in ("one", "two")
    )
    assert [w["blocks"] for w in one] == [w["blocks"] for w in two]
    for key in ("loss_before", "loss_after"):
        np.testing.assert_allclose([w[key] for w in one], [w[key] for w in two], rtol=1e-4)
    found = {name: noise_db(tmp_path / f"{name}.onnx") for name in ("one", "two")}
    assert found["one"] == pytest.approx(found["two"], abs=0.1)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_processes_with_nothing_to_share_are_refused(calls: Path, tmp_path: Path) -> None:
    options = ("--scheme", "w2a16:b32", "--calibration", calls, "--reconstruct", "cbq")
    done = _two_processes(DIGITS, *options, "-o", tmp_path / "two.onnx")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "2 processes cannot share steps of 1 calls" in done.stderr
    assert "--calls-per-step 2" in done.stderr
    assert not list(tmp_path.iterdir())
