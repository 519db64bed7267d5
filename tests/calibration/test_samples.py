"""Inputs from .npz files and made up ones."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.samples import load_feeds, synthetic_feeds
from qcompiler.errors import UsageError
from tests.support.graphs import build

X = np.ones((2, 4), np.float32)
IDS = np.zeros((2,), np.int64)


def _model() -> ir.Model:
    return build(
        "g (float[b, 4] x, int64[b] ids) => (float[b, 4] y, int64[b] z)"
        "{ y = Relu(x) z = Identity(ids) }"
    )


def _refusal(tmp_path: Path, **arrays: Any) -> UsageError:
    path = tmp_path / "samples.npz"
    np.savez(path, **arrays)
    with pytest.raises(UsageError) as caught:
        load_feeds(path, _model())
    assert caught.value.where == str(path)
    return caught.value


def test_arrays_come_back_in_the_order_of_the_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", ids=IDS, x=X)
    feeds = load_feeds(tmp_path / "s.npz", _model())
    assert list(feeds) == ["x", "ids"]
    np.testing.assert_array_equal(feeds["x"], X)


def test_an_extra_name_is_refused(tmp_path: Path) -> None:
    error = _refusal(tmp_path, x=X, ids=IDS, mask=IDS)
    assert error.message == "holds ids, mask, x, and the model's inputs are ids, x"
    assert error.hint == "not in the model: mask"


def test_a_missing_name_is_refused(tmp_path: Path) -> None:
    error = _refusal(tmp_path, x=X)
    assert error.message == "holds x, and the model's inputs are ids, x"
    assert error.hint == "missing: ids"


def test_a_misspelt_name_is_named_on_both_sides(tmp_path: Path) -> None:
    assert _refusal(tmp_path, x=X, idz=IDS).hint == "missing: ids; not in the model: idz"


def test_an_empty_archive_is_refused(tmp_path: Path) -> None:
    assert "holds nothing" in _refusal(tmp_path).message


def test_another_type_is_refused(tmp_path: Path) -> None:
    error = _refusal(tmp_path, x=X.astype(np.float64), ids=IDS)
    assert error.message == "holds float64 for input x, which takes FLOAT"
    assert error.hint == "convert it with .astype('float32')"


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    error = _refusal(tmp_path, x=np.array([{"a": 1}], object), ids=IDS)
    assert "cannot be read as an .npz file of plain arrays" in error.message


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_what_is_not_an_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be read as an \.npz file of plain arrays"):
        load_feeds(path, _model())


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez_compressed(path, x=X, ids=np.arange(1000))
    data = bytearray(path.read_bytes())
    data[60:120] = bytes(60)
    path.write_bytes(bytes(data))
    with pytest.raises(UsageError, match=r"cannot be read as an \.npz file of plain arrays"):
        load_feeds(path, _model())


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(UsageError, match=r"cannot be read as an \.npz file of plain arrays"):
        load_feeds(tmp_path / "one.npy", _model())


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_feeds(tmp_path / "none.npz", _model())


def test_texts_are_taken_for_a_string_input(tmp_path: Path) -> None:
    model = build("g (string[n] s) => (string[n] t) { t = Identity(s) }")
    np.savez(tmp_path / "s.npz", s=np.array(["a", "bc"]))
    assert load_feeds(tmp_path / "s.npz", model)["s"].tolist() == ["a", "bc"]


def test_made_up_inputs_follow_the_signature() -> None:
    feeds = synthetic_feeds(_model(), seed=3)
    assert feeds["x"].shape == (4, 4)
    assert feeds["x"].dtype == np.dtype(np.float32)
    assert feeds["ids"].tolist() == [1, 1, 1, 1]
    np.testing.assert_array_equal(feeds["x"], synthetic_feeds(_model(), seed=3)["x"])
    assert not np.array_equal(feeds["x"], synthetic_feeds(_model(), seed=4)["x"])


def test_no_text_is_made_up() -> None:
    model = build("g (string[n] s) => (string[n] t) { t = Identity(s) }")
    with pytest.raises(UsageError, match="input s: is a string tensor"):
        synthetic_feeds(model, seed=0)
