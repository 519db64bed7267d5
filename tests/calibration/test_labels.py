"""Labels beside the inputs: every call gets those of its samples."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import SampleOptions, Samples
from qcompiler.calibration.samples import open_samples
from qcompiler.errors import UsageError
from tests.support.graphs import build


def _model(batch: str) -> ir.Model:
    return build(f"m (float[{batch}, 4] x) => (float[{batch}, 4] y) {{ y = Relu(x) }}")


def _open(
    path: Path, batch: str = "batch", size: int | None = None, *, needs: bool = True
) -> Samples:
    options = SampleOptions(batch_size=size)
    return open_samples(str(path), _model(batch), options, label="label", needs_label=needs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    np.savez(tmp_path / "d.npz", x=rows, label=np.arange(10, dtype=np.int32))
    return tmp_path / "d.npz"


@pytest.mark.parametrize(
    ("batch", "size", "calls"),
    [("batch", None, 1), ("batch", 4, 3), ("5", None, 2), ("1", None, 10)],
)
def test_labels_follow_their_samples(path: Path, batch: str, size: int | None, calls: int) -> None:
    found = list(_open(path, batch, size))
    assert len(found) == calls
    for feeds in found:
        assert feeds["label"].dtype == np.int64
        assert feeds["label"].tolist() == (feeds["x"][:, 0] // 4).astype(int).tolist()


def test_stacked_calls(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((6, 1, 4), np.float32), label=np.arange(6))
    found = list(_open(tmp_path / "d.npz", "1"))
    assert [feeds["label"].tolist() for feeds in found] == [[n] for n in range(6)]


def test_labels_may_be_there_where_none_are_needed(path: Path, tmp_path: Path) -> None:
    assert "label" in next(iter(_open(path, needs=False)))
    np.savez(tmp_path / "bare.npz", x=np.zeros((2, 4), np.float32))
    assert "label" not in next(iter(_open(tmp_path / "bare.npz", needs=False)))
    with pytest.raises(UsageError, match="missing: label"):
        _open(tmp_path / "bare.npz")


def test_sources_without_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UsageError, match="samples from text have no labels"):
        _open(tmp_path / "a.txt")
    with pytest.raises(UsageError, match="samples from random have no labels"):
        open_samples("random:2", _model("1"), SampleOptions(), label="label", needs_label=True)


def test_labels_of_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "labelled_calls.py").write_text(
        "import numpy as np\n"
        "def calls():\n"
        "    for n in range(3):\n"
        "        yield {'x': np.full((2, 4), n, np.float32), 'label': np.array([n, n])}\n"
    )
    monkeypatch.chdir(tmp_path)
    found = open_samples(
        "labelled_calls:calls", _model("2"), SampleOptions(), label="label", needs_label=True
    )
    assert [feeds["label"].tolist() for feeds in found] == [[0, 0], [1, 1], [2, 2]]
