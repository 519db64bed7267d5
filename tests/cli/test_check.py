import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from qcompiler.cli.main import main
from qcompiler.compile import compile_model
from qcompiler.options import CompileOptions

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = CompileOptions(scheme="w8a16", inspect_kernels=False)
    output = tmp_path_factory.mktemp("check") / "digits.w8a16.onnx"
    return compile_model(DIGITS / "digits.onnx", options, output=output).path


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], compiled: Path) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        data = ("--data", DIGITS / "test_data.npz", "--batch-size", 50)
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in ("check", DIGITS / "digits.onnx", compiled, *data, *arguments)])
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    return run


def test_passes(check: Run) -> None:
    status, out, _ = check(
        *("--gate", "min-sqnr=20", "--gate", "metric=top1", "--gate", "max-metric-drop=0.01")
    )
    assert status == 0
    assert "PASSED   max_metric_drop of top1" in out
    assert "450 samples" in out
    assert out.splitlines()[-1].startswith("gate passed: digits.w8a16.onnx against digits.onnx")


def test_fails_and_writes_every_form(
    check: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    (tmp_path / "summary.md").write_text("before\n")
    files = {form: tmp_path / f"v.{form}" for form in ("junit", "json", "markdown")}
    options = [text for form, path in files.items() for text in (f"--{form}", path)]
    status, out, _ = check("--gate", "min-sqnr=100", *options)
    assert status == 5
    assert "::error title=qcompile min_sqnr of logits::" in out
    assert "suspects, the likeliest first:" in out
    assert Xml.parse(files["junit"]).getroot().get("failures") == "1"
    verdict = json.loads(files["json"].read_text())
    assert (verdict["schema"], verdict["passed"]) == ("qcompiler-gate", False)
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("before\n### qcompile gate")
    assert files["markdown"].read_text() in summary
    status, out, _ = check("--baseline", files["json"], "--gate", "tolerance.latency=9")
    assert status == 0
    assert "no worse: sqnr of logits" in out


def test_faults(check: Run, tmp_path: Path) -> None:
    assert check()[0] == 2
    status, _, err = check("--gate", "min-snr=3")
    assert status == 2
    assert "known: data, labels" in err
    assert check("--gate", "min-sqnr=3", "--manifest", tmp_path / "no.json")[0] == 2
    status, _, err = check("--gate", "min-sqnr=3", "--junit", tmp_path / "none" / "v.xml")
    assert status == 2
    assert "v.xml" in err or "none" in err


def test_compile_with_a_gate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def run(bound: str, *more: object) -> tuple[int, str, str]:
        gate = ("--gate", f"data={DIGITS / 'test_data.npz'}", "--gate", bound)
        arguments = (DIGITS / "digits.onnx", "-o", tmp_path / "m.onnx", "--no-inspect", *gate)
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in (*arguments, "--scheme", "w8a16", "--batch-size", 50, *more)])
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    status, out, err = run("min-sqnr=100", "--json", tmp_path / "v.json")
    assert status == 5
    assert "suspects" in out
    assert "the gate failed" in err
    assert [path.name for path in tmp_path.iterdir()] == ["v.json"]
    status, out, err = run("min-sqnr=20", "--report", "json")
    assert status == 0
    assert json.loads(out)["schema"] == "qcompiler-report"
    assert "gate passed" in err
    assert (tmp_path / "m.onnx").exists()
