"""Whole searches: what is chosen holds the bounds, is what it says, and leaves nothing else."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.artefacts import CompileResult
from qcompiler.bounds import gate_from_texts
from qcompiler.cli.main import main
from qcompiler.compile import compile_model
from qcompiler.errors import ParityError, UsageError
from qcompiler.gate import latency_ratio
from qcompiler.options import CalibrationOptions, CompileOptions, EqualizationOptions, TaskOptions
from qcompiler.quant.islands import Saliency
from qcompiler.reconstruction import island_scores
from qcompiler.reconstruction.gradients import sum_gradients
from qcompiler.report.files import read_report
from qcompiler.report.search_points import SearchReport
from qcompiler.reproduce import reproduce
from qcompiler.search import SearchRequest, compile_searching, trial
from tests.support.graphs import build
from tests.support.islands import TEXT, data, weights

SCHEMES = ("w8a16", "w4a16:b32", "w2a16:b32")


@pytest.fixture(scope="module", autouse=True)
def _short_measurements() -> Iterator[None]:
    """Measure whole models for a tenth of a second: what is slower is not asked here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_ratio, "SECONDS", (0.1, 0.1))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the classifier of two tasks, with 8 calls of one beside it."""
    folder = tmp_path_factory.mktemp("source")
    ir.save(build(TEXT, weights(0), opset=21), folder / "m.onnx")
    (folder / "calls").mkdir()
    for at, rows in enumerate(np.split(data(0, 256, 0), 8)):
        np.savez(folder / "calls" / f"{at}.npz", x=rows)
    return folder / "m.onnx"


def _options(source: Path, **changes: object) -> CompileOptions:
    calls = str(source.parent / "calls")
    return CompileOptions(calibration=calls, equalization=None, html=False, **changes)  # type: ignore[arg-type]


def _search(result: CompileResult) -> SearchReport:
    found = read_report(result.report_path).search
    assert found is not None
    return found


@pytest.fixture(scope="module")
def searched(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompileResult, Path]:
    """Return what a search with bounds on everything made, and its file of measurements."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "out").mkdir()
    measurements = folder / "measured.json"
    options = _options(source, min_output_sqnr=14.0, measurements=measurements)
    request = SearchRequest(SCHEMES, average_bits=9.0, max_latency_ratio=1000.0)
    result = compile_searching(source, options, request, output=folder / "out" / "o.onnx")
    return result, measurements


def test_the_smallest_that_holds_is_chosen(searched: tuple[CompileResult, Path]) -> None:
    result, _ = searched
    found = _search(result)
    assert found.aim == "smallest"
    assert found.accuracy == "divergence"
    assert found.judged_on.startswith("the last 2 calls of")
    (chosen,) = [point for point in found.points if point.outcome == "chosen"]
    holding = [point for point in found.points if point.outcome in ("holds", "chosen")]
    assert chosen.bytes == min(point.bytes or 0 for point in holding) == result.path.stat().st_size
    for point in found.points:
        if point.outcome == "not made":
            assert point.reason
            continue
        assert point.sqnr_db is not None
        assert (point.sqnr_db >= 14) == (point.outcome != "fails"), point
        assert point.average_bits is not None
        assert point.average_bits <= 9.01
        assert point.latency_ratio is not None
        assert point.predicted_latency is not None
    assert any(point.outcome == "fails" and "dB" in point.reason for point in found.points)
    names = " ".join(point.name for point in found.points)
    assert all(part in names for part in ("columns to", "whole weights to", *SCHEMES))


def test_points_that_none_beats_are_marked(searched: tuple[CompileResult, Path]) -> None:
    made = [point for point in _search(searched[0]).points if point.bytes is not None]
    for point in made:
        beaten = any(
            (other.bytes or 0) <= (point.bytes or 0)
            and (other.divergence or 0) <= (point.divergence or 0)
            and (other.latency_ratio or 0) < (point.latency_ratio or 0)
            for other in made
        )
        assert not (beaten and point.pareto)
    assert any(point.pareto for point in made)


def test_nothing_else_stays_on_the_disk(searched: tuple[CompileResult, Path]) -> None:
    result, _ = searched
    found = sorted(path.name for path in result.path.parent.iterdir())
    assert found == ["o.manifest.json", "o.onnx", "o.report.json"]


def test_its_manifest_leads_to_the_same_bytes(
    searched: tuple[CompileResult, Path], source: Path
) -> None:
    calibration = CalibrationOptions(str(source.parent / "calls"))
    found = reproduce(searched[0].manifest_path, source, calibration)
    assert found.identical, found


def _measures_nothing(*_arguments: object, **_others: object) -> None:
    pytest.fail("something was measured again")


def test_the_file_of_measurements_decides(
    searched: tuple[CompileResult, Path],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result, measured = searched
    for name in ("trial.time_models", "preparation.compare_latency"):
        monkeypatch.setattr(f"qcompiler.search.{name}", _measures_nothing)
    options = _options(source, min_output_sqnr=14.0, measurements=measured)
    request = SearchRequest(SCHEMES, average_bits=9.0, max_latency_ratio=1000.0)
    again = compile_searching(source, options, request, output=tmp_path / "o.onnx")
    assert again.path.read_bytes() == result.path.read_bytes()
    assert _search(again) == _search(result)

    content = json.loads(measured.read_text())
    (chosen,) = [point for point in _search(result).points if point.outcome == "chosen"]
    for entry in content["measurements"].values():
        if entry["what"] == f"m.onnx: {chosen.name}":
            entry["timings"]["compiled"] = [1.0, 2000.0, 2000.0, 2000.0]
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    options = _options(source, min_output_sqnr=14.0, measurements=changed)
    other = compile_searching(source, options, request, output=tmp_path / "o.onnx")
    points = {point.name: point for point in _search(other).points}
    assert points[chosen.name].reason == "2000.00 of float's time"
    assert points[chosen.name].outcome == "fails"
    (now,) = [point for point in points.values() if point.outcome == "chosen"]
    assert (now.bytes or 0) > (chosen.bytes or 0)


def test_without_a_bound_on_accuracy_the_most_accurate_is_chosen(
    source: Path, tmp_path: Path
) -> None:
    options = _options(source)
    request = SearchRequest(SCHEMES, saliency=None, average_bits=5.5)
    result = compile_searching(source, options, request, output=tmp_path / "o.onnx")
    found = _search(result)
    assert found.aim == "most accurate"
    outcomes = {point.name: point.outcome for point in found.points}
    assert outcomes["w8a16"] == "not made"
    chosen = next(point for point in found.points if point.outcome == "chosen")
    made = [point for point in found.points if point.divergence is not None]
    assert chosen.divergence == min(point.divergence or 0 for point in made)
    assert {rule.name for rule in result.report.passes}.isdisjoint({"round-weights"})


def test_bytes_are_a_budget(source: Path, tmp_path: Path) -> None:
    options = _options(source)
    request = SearchRequest(SCHEMES, Saliency.MAGNITUDE, nbytes=9000)
    result = compile_searching(source, options, request, output=tmp_path / "o.onnx")
    assert result.report.summary.weight_bytes_after <= 9000


@pytest.mark.parametrize(
    ("changes", "request_", "message"),
    [
        ({"min_output_sqnr": 200.0}, {}, r"nearest: w8a16 with .* bits, .* dB.*, but .* dB"),
        ({}, {"average_bits": 1.0}, "w8a16: it takes .* bits, and 1.00 bits are allowed"),
        ({}, {"max_latency_ratio": 1e-6}, "of float's time"),
    ],
)
def test_where_nothing_holds_nothing_is_written(
    changes: dict[str, object],
    request_: dict[str, float],
    message: str,
    source: Path,
    tmp_path: Path,
) -> None:
    request = SearchRequest(SCHEMES[:2], None, **request_)  # type: ignore[arg-type]
    options = _options(source, **changes)
    with pytest.raises(ParityError, match=message) as caught:
        compile_searching(source, options, request, output=tmp_path / "o.onnx")
    assert caught.value.reason == "nothing-holds"
    assert not list(tmp_path.iterdir())


def test_a_metric_is_a_bound(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = data(0, 64, 7)
    np.savez(tmp_path / "rows.npz", x=rows)
    (tmp_path / "scoring.py").write_text(
        "import numpy as np\n"
        f"rows = np.load({str(tmp_path / 'rows.npz')!r})['x']\n"
        "def spread(run):\n    return float(-np.abs(run({'x': rows})['logits']).max())\n"
    )
    monkeypatch.chdir(tmp_path)
    options = _options(source, metric="scoring:spread", max_metric_drop=1000.0)
    result = compile_searching(
        source, options, SearchRequest(SCHEMES[1:], None), output=tmp_path / "o.onnx"
    )
    found = _search(result)
    assert found.accuracy == "metric"
    assert found.source_metric is not None
    assert all(point.metric is not None for point in found.points)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], source: Path) -> Iterator[object]:
    """Run the command on the classifier; gives exit status, standard output and error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(source), "--calibration", str(source.parent / "calls"), *map(str, arguments)])
        text = capsys.readouterr()
        return int(stop.value.code or 0), text.out, text.err

    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)


def test_the_command_searches(run: object, tmp_path: Path) -> None:
    assert callable(run)
    common = ("--search", "--islands", "none", "--scheme", "w8a16,w4a16:b32", "-o")
    status, out, err = run(*common, tmp_path / "o.onnx", "--min-output-sqnr", 10)
    assert status == 0, err
    assert "searched for the smallest that holds --min-output-sqnr 10" in out
    assert "-> w4a16:b32: " in out
    assert 'id="search"' in (tmp_path / "o.report.html").read_text()
    status, _, err = run(*common, tmp_path / "p.onnx", "--min-output-sqnr", 300)
    assert status == 5
    assert "explain --reason nothing-holds" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--search",), "nothing says what the result must keep"),
        (("--max-latency-ratio", 0.9), "add --search, or --gate max-latency=R"),
        (("--search", "--average-bits", 3, "--island-kind", "node"), "--island-kind"),
        (("--search", "--average-bits", 0), "must be above 0"),
        (("--search", "--average-bits", 3, "--budget-bytes", "1MB"), "two budgets"),
        (("--search", "--average-bits", 3, "--dump-ir", "d"), "--dump-ir belongs to one"),
        (("--search", "--average-bits", 3, "-o", "x.qbundle"), "a search writes a model"),
        (
            ("--search", "--max-latency-ratio", 1, "--target", "tensorrt-rtx"),
            "cannot be measured by ONNX Runtime",
        ),
    ],
)
def test_what_cannot_be_is_said(arguments: tuple[object, ...], message: str, run: object) -> None:
    assert callable(run)
    status, _, err = run(*arguments)
    assert status == 2
    assert message in err


def test_the_gradient_of_labels_is_computed_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "task.npz", x=data(0, 48, 3), labels=np.arange(48) % 10)
    computed: list[object] = []

    def counted(*arguments: object) -> float:
        computed.append(arguments)
        return sum_gradients(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(island_scores, "sum_gradients", counted)
    options = CompileOptions(
        calibration=str(source.parent / "calls"),
        task=TaskOptions(str(tmp_path / "task.npz")),
        equalization=EqualizationOptions(None),
    )
    request = SearchRequest(SCHEMES, average_bits=8.0)
    result = compile_searching(source, options, request, output=tmp_path / "o.onnx")
    names = [p.name for p in _search(result).points if p.bytes is not None]
    assert sum("columns" in name for name in names) > 1
    assert len(computed) == 1


def test_a_gate_is_a_bound(source: Path, tmp_path: Path) -> None:
    options = _options(source, gate=gate_from_texts(["min-sqnr=25"]))
    request = SearchRequest(SCHEMES, None, average_bits=20.0)
    result = compile_searching(source, options, request, output=tmp_path / "o.onnx")
    assert result.verdict is not None
    assert result.verdict.passed
    points = {point.name: point for point in _search(result).points}
    assert points["w2a16:b32"].outcome == "not made"
    assert "min_sqnr" in points["w2a16:b32"].reason


def test_islands_fill_the_budget_above_one_scheme(source: Path, tmp_path: Path) -> None:
    request = SearchRequest(SCHEMES[2:], average_bits=6.5)
    result = compile_searching(source, _options(source), request, output=tmp_path / "o.onnx")
    found = [point.name for point in _search(result).points if point.bytes is not None]
    assert found[:2] == ["w2a16:b32", "w2a16:b32, columns to 6.50 bits"]


def test_a_stopped_search_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def stopped(*arguments: object, output: Path, **others: object) -> CompileResult:
        if made:
            raise KeyboardInterrupt
        made.append(output)
        return compile_model(*arguments, output=output, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(trial, "compile_model", stopped)
    options = _options(source, min_output_sqnr=1.0)
    with pytest.raises(KeyboardInterrupt):
        compile_searching(
            source, options, SearchRequest(SCHEMES[:2], None), output=tmp_path / "o.onnx"
        )
    assert made
    assert not list(tmp_path.iterdir())


def test_one_call_that_judges_what_it_chose_is_told(source: Path, tmp_path: Path) -> None:
    options = CompileOptions(calibration=str(source.parent / "calls" / "0.npz"))
    request = SearchRequest(("w4a16:b32",), None, average_bits=20.0)
    result = compile_searching(source, options, request, output=tmp_path / "o.onnx")
    assert any("on the only call" in warning for warning in result.report.warnings)


def test_a_task_alone_is_enough(source: Path, tmp_path: Path) -> None:
    rows = data(0, 48, 3)
    np.savez(tmp_path / "task.npz", x=rows, labels=np.arange(48) % 10)
    options = CompileOptions(task=TaskOptions(str(tmp_path / "task.npz")), equalization=None)
    result = compile_searching(
        source,
        options,
        SearchRequest(SCHEMES[1:], average_bits=5.6),
        output=tmp_path / "o.onnx",
    )
    found = _search(result)
    assert found.judged_on.startswith("the last 12 calls of labels of 48 rows")
    assert {"columns", "whole"} <= {word for p in found.points for word in p.name.split()}
    task = TaskOptions(str(tmp_path / "task.npz"))
    assert reproduce(result.manifest_path, source, task=task).identical


def test_a_search_needs_samples(source: Path) -> None:
    with pytest.raises(UsageError, match="compared on samples"):
        compile_searching(source, CompileOptions(), SearchRequest(SCHEMES, average_bits=4))
