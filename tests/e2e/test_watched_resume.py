"""A compilation that goes on where it was stopped: the report says what it saw, and no more."""

from functools import partial
from pathlib import Path

import onnx_ir as ir
import pytest

import qcompiler.compile
from qcompiler.artefacts import CompileResult
from qcompiler.calibration.calls import SampleOptions
from qcompiler.calibration.observers import Observer
from qcompiler.compile import compile_model
from qcompiler.options import CalibrationOptions, CompileOptions
from qcompiler.report.files import read_report
from qcompiler.rewriting.base import Pass, PassResult
from qcompiler.rewriting.graph_changes import CountGraphChanges
from qcompiler.rewriting.work_folder import WorkFolder

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
FEW = CalibrationOptions(
    str(EXAMPLE / "calibration.npz"), SampleOptions(max_samples=16), Observer.MIN_MAX
)


def gone_on_after(stop: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> CompileResult:
    """Kill a compilation before the pass of this name is through, and start it again."""
    options = CompileOptions(
        "w8a8", calibration=FEW, never_slower=False, work_dir=folder / "work", inspect_kernels=False
    )
    seen = CountGraphChanges.after_pass

    def killed(self: CountGraphChanges, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        if rewrite.name == stop:
            raise KeyboardInterrupt
        seen(self, model, rewrite, result)

    monkeypatch.setattr(qcompiler.compile, "WorkFolder", partial(WorkFolder, fewest_seconds=0))
    with monkeypatch.context() as patched:
        patched.setattr(CountGraphChanges, "after_pass", killed)
        with pytest.raises(KeyboardInterrupt):
            compile_model(EXAMPLE / "digits.onnx", options, output=folder / "m.onnx")
    return compile_model(EXAMPLE / "digits.onnx", options, output=folder / "m.onnx")


@pytest.mark.parametrize(
    ("stop", "grown", "profiled"),
    [
        ("fold-constants", True, True),
        ("calibrate", True, False),
        ("insert-activation-qdq", False, False),
    ],
)
def test_what_was_not_seen_is_left_out(
    stop: str, grown: bool, profiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = gone_on_after(stop, tmp_path, monkeypatch)
    report = result.report
    position = next(i for i, record in enumerate(report.passes) if record.name == stop)
    assert position
    assert all(record.nodes is None for record in report.passes[:position])
    assert all(record.nodes is not None for record in report.passes[position:])
    assert any(record.changes for record in report.passes[:position]), "rewrites were kept"
    assert any(node.output_sqnr_db is not None for node in report.nodes) is grown
    assert bool(report.channels) is profiled
    assert read_report(result.report_path) == report
    assert result.page_path is not None
    assert ("of results is" in result.page_path.read_text()) is not grown
