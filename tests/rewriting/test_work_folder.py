import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import SampleOptions
from qcompiler.calibration.observers import Observer
from qcompiler.errors import UsageError
from qcompiler.ir.load import load_model
from qcompiler.ir.save import save_model
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CalibrationOptions, CompileOptions, Reconstruction
from qcompiler.passes.assign.assign_schemes import AssignSchemes
from qcompiler.pipeline import pipeline
from qcompiler.plan import make_plan, with_data
from qcompiler.progress import SilentProgress
from qcompiler.quant.reconstruction import BlockReconstruction
from qcompiler.rewriting.base import Pass, PassContext, PassRecord
from qcompiler.rewriting.manager import PassManager
from qcompiler.rewriting.work_folder import WorkFolder

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
FEW = CalibrationOptions(
    str(EXAMPLE / "calibration.npz"), SampleOptions(max_samples=16), Observer.MIN_MAX
)
IDENTITY: Mapping[str, Any] = {"model": "a1", "settings": {"scheme": "w8a8", "alpha": 0.5}}


def passes_of(options: CompileOptions, model: ir.Model) -> list[Pass]:
    return pipeline(with_data(make_plan(options), model, lambda: "digits"))


def run(
    folder: Path, passes: Sequence[Pass], output: Path, work: WorkFolder | None = None
) -> list[PassRecord]:
    """Go on where the work folder stands, to the last of the passes, and write the model."""
    model = load_model(EXAMPLE / "digits.onnx")
    reached = work.newest() if work else None
    model = reached.model if reached else model
    with WeightStore(folder, spill_bytes=2048) as store:
        manager = PassManager(PassContext(store), work=work)
        records = manager.run(model, passes, reached.records if reached else ())
        save_model(model, output, progress=SilentProgress(), external_data=True)
    return records


def told(record: PassRecord) -> tuple[object, ...]:
    """Return a record without times."""
    rewrites = [(type(each), each.rule, each.node, each.detail) for each in record.rewrites]
    return record.name, record.stage, rewrites, record.skips


def content(path: Path) -> tuple[bytes, bytes]:
    return path.read_bytes(), path.with_name(path.name + ".data").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        CompileOptions(scheme="w4a16:b32"),
        CompileOptions(scheme="w8a8", calibration=FEW, never_slower=False),
        CompileOptions(
            scheme="w3a16:b32",
            calibration=FEW,
            reconstruct=Reconstruction.CBQ,
            blocks=BlockReconstruction(steps=2),
        ),
    ],
    ids=["weight-only", "w8a8", "cbq"],
)
def test_going_on_after_any_pass_gives_the_same_bytes(
    options: CompileOptions, tmp_path: Path
) -> None:
    passes = passes_of(options, load_model(EXAMPLE / "digits.onnx"))
    expected = run(tmp_path, passes, tmp_path / "m.onnx")
    truth = content(tmp_path / "m.onnx")
    (tmp_path / "again").mkdir()
    # Of canonicalizing passes, which write nothing on values, the last stands for all.
    first = next(i for i, each in enumerate(passes) if each.name == AssignSchemes.name)
    for count in range(first, len(passes)):
        with WorkFolder(tmp_path / "work", IDENTITY, fewest_seconds=0) as work:
            run(tmp_path, passes[:count], tmp_path / "part.onnx", work)
        with WorkFolder(tmp_path / "work", IDENTITY, fewest_seconds=0) as work:
            reached = work.newest()
            assert reached is not None
            assert [record.name for record in reached.records] == [p.name for p in passes[:count]]
            records = run(tmp_path, passes, tmp_path / "again" / "m.onnx", work)
            work.finish()
        assert content(tmp_path / "again" / "m.onnx") == truth, passes[count].name
        assert list(map(told, records)) == list(map(told, expected))
        assert not (tmp_path / "work").exists()


def test_short_work_leaves_no_checkpoint(tmp_path: Path) -> None:
    passes = passes_of(CompileOptions(), load_model(EXAMPLE / "digits.onnx"))
    with WorkFolder(tmp_path / "work", IDENTITY, fewest_seconds=1000) as work:
        run(tmp_path, passes, tmp_path / "m.onnx", work)
        assert work.newest() is None


def test_another_compilation_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    WorkFolder(tmp_path / "work", IDENTITY).__exit__()
    other = {"model": "a1", "settings": {"scheme": "w4a16", "alpha": 0.5}}
    with pytest.raises(UsageError, match=r'settings.scheme was "w8a8" and is "w4a16"') as caught:
        WorkFolder(tmp_path / "work", other)
    assert "alpha" not in caught.value.message
    WorkFolder(tmp_path / "work", IDENTITY).__exit__()


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not empty"):
        WorkFolder(tmp_path, IDENTITY)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_finishing_leaves_foreign_files(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work", IDENTITY) as work:
        (tmp_path / "work" / "notes.txt").write_text("mine")
        work.finish()
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["notes.txt"]


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        WorkFolder(tmp_path / "work", IDENTITY),
        pytest.raises(UsageError, match="another compilation is using"),
    ):
        WorkFolder(tmp_path / "work", IDENTITY)


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "qcompiler-work", "schema_version": 9}'])
def test_a_head_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "work.json").write_text(text)
    with pytest.raises(UsageError, match="whose work"):
        WorkFolder(tmp_path / "work", IDENTITY)


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    passes = passes_of(CompileOptions(), load_model(EXAMPLE / "digits.onnx"))
    with WorkFolder(tmp_path / "work", IDENTITY, fewest_seconds=0) as work:
        run(tmp_path, passes[:3], tmp_path / "m.onnx", work)
    torn = tmp_path / "work" / ".unfinished-004-x"
    torn.mkdir()
    (torn / "model.onnx").write_bytes(b"half")
    with WorkFolder(tmp_path / "work", IDENTITY) as work:
        assert not torn.exists()
        reached = work.newest()
    assert reached is not None
    assert len(reached.records) == 3


def test_records_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    passes = passes_of(CompileOptions(), load_model(EXAMPLE / "digits.onnx"))
    with WorkFolder(tmp_path / "work", IDENTITY, fewest_seconds=0) as work:
        run(tmp_path, passes[:2], tmp_path / "m.onnx", work)
        (records,) = (tmp_path / "work").glob("*/passes.json")
        records.write_text(json.dumps([{"name": "x"}]))
        with pytest.raises(UsageError, match="records of a compilation"):
            work.newest()
