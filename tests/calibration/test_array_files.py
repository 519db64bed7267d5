"""Samples from .npz and .npy files: how arrays become calls."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.array_files import open_array_files
from qcompiler.calibration.calls import SampleOptions, Samples
from qcompiler.calibration.signature import read_signature
from qcompiler.errors import UsageError
from tests.support.graphs import build

X = np.arange(8, dtype=np.float32).reshape(2, 4)
IDS = np.array([5, 6])
BOTH = "float[b, 4] x, int64[b] ids"
PAIR = r"cannot be read as an \.npz file of plain arrays"


def _model(inputs: str = BOTH, weights: dict[str, Any] | None = None) -> ir.Model:
    return build(f"g ({inputs}) => (float y) {{ y = Constant<value_float=1.0>() }}", weights)


def _open(path: Path, inputs: str = BOTH, **options: Any) -> Samples:
    return open_array_files(path, read_signature(_model(inputs)), SampleOptions(**options))


def _saved(path: Path, **arrays: Any) -> Path:
    np.savez(path / "data.npz", **arrays)
    return path / "data.npz"


def _refusal(path: Path, inputs: str = BOTH, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        list(_open(path, inputs, **options))
    return caught.value


def test_arrays_of_the_inputs_rank_are_one_call(tmp_path: Path) -> None:
    samples = _open(_saved(tmp_path, ids=IDS, x=X))
    (feeds,) = samples
    assert list(feeds) == ["x", "ids"]
    np.testing.assert_array_equal(feeds["x"], X)
    assert samples.origin == "1 call from data.npz"
    assert not samples.made_up


def test_one_axis_more_is_a_stack_of_calls(tmp_path: Path) -> None:
    samples = _open(_saved(tmp_path, ids=np.stack([IDS] * 3), x=np.stack([X, X + 1, X + 2])))
    assert len(samples) == 3
    for index, feeds in enumerate(samples):
        np.testing.assert_array_equal(feeds["x"], X + index)
        assert feeds["ids"].tolist() == [5, 6]


def test_an_array_of_the_inputs_rank_beside_a_stack_is_for_every_call(tmp_path: Path) -> None:
    samples = _open(
        _saved(tmp_path, sr=np.array(16000), x=np.zeros((3, 1, 4), np.float32)),
        "float[b, 4] x, int64 sr",
    )
    assert [int(feeds["sr"]) for feeds in samples] == [16000] * 3


def test_max_samples_takes_the_first_calls(tmp_path: Path) -> None:
    path = _saved(tmp_path, ids=np.stack([IDS] * 3), x=np.stack([X, X + 1, X + 2]))
    samples = _open(path, max_samples=2)
    assert len(samples) == len(list(samples)) == 2
    assert samples.origin == "2 calls from data.npz (of 3)"


def test_a_symbolic_batch_is_split_by_batch_size(tmp_path: Path) -> None:
    path = _saved(tmp_path, ids=np.arange(5), x=np.arange(20, dtype=np.float32).reshape(5, 4))
    assert len(_open(path)) == 1
    calls = list(_open(path, batch_size=2))
    assert [feeds["ids"].tolist() for feeds in calls] == [[0, 1], [2, 3], [4]]
    assert calls[2]["x"].tolist() == [[16, 17, 18, 19]]
    assert len(_open(path, batch_size=5)) == 1


def test_the_batch_is_split_on_the_axis_of_its_name(tmp_path: Path) -> None:
    state = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    path = _saved(tmp_path, x=np.zeros((3, 4), np.float32), state=state, table=np.zeros((9, 2)))
    inputs = "float[batch, 4] x, float[2, batch, 2] state, double[n, 2] table"
    calls = list(_open(path, inputs, batch_size=1))
    assert len(calls) == 3
    for index, feeds in enumerate(calls):
        np.testing.assert_array_equal(feeds["state"], state[:, index : index + 1])
        assert feeds["table"].shape == (9, 2)


def test_batches_without_a_name_are_split_on_the_first_axis(tmp_path: Path) -> None:
    path = _saved(tmp_path, x=np.zeros((4, 4), np.float32), ids=np.arange(4))
    calls = list(_open(path, "float[?, ?] x, int64[?] ids", batch_size=2))
    assert [feeds["x"].shape for feeds in calls] == [(2, 4), (2, 4)]


def test_a_batch_that_the_model_fixes_divides_the_file(tmp_path: Path) -> None:
    path = _saved(tmp_path, x=np.arange(24, dtype=np.float32).reshape(6, 4))
    calls = list(_open(path, "float[2, 4] x"))
    assert [feeds["x"][0, 0] for feeds in calls] == [0, 8, 16]
    assert len(_open(path, "float[2, 4] x", max_samples=4)) == 2
    error = _refusal(path, "float[4, 4] x")
    assert error.hint == "input x: axis 0 is 6 where 4 is taken"


def test_max_samples_counts_rows_where_a_batch_is_split(tmp_path: Path) -> None:
    path = _saved(tmp_path, ids=np.arange(10), x=np.zeros((10, 4), np.float32))
    assert len(_open(path, batch_size=2, max_samples=6)) == 3
    assert len(_open(path, batch_size=4, max_samples=1)) == 1


def test_different_numbers_of_calls_are_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path, ids=np.stack([IDS] * 2), x=np.stack([X] * 3))
    assert _refusal(path).message == "its arrays hold different numbers of calls: ids 2, x 3"


def test_a_stack_of_nothing_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path, ids=np.zeros((0, 2), np.int64), x=np.zeros((0, 2, 4), np.float32))
    assert "holds no call" in _refusal(path).message


def test_calls_of_a_stack_are_checked_like_calls(tmp_path: Path) -> None:
    path = _saved(tmp_path, ids=np.stack([IDS] * 2), x=np.zeros((2, 3, 5), np.float32))
    error = _refusal(path)
    assert error.hint == "input x: axis 1 is 5 where 4 is taken"
    assert error.message.startswith("holds ids int64[2, 2], x float32[2, 3, 5], and the model")


@pytest.mark.parametrize(
    ("arrays", "hint"),
    [
        ({"x": X, "ids": IDS, "mask": IDS}, "not in the model: mask"),
        ({"x": X}, "missing: ids"),
        ({"x": X, "idz": IDS}, "missing: ids; not in the model: idz"),
        ({}, "missing: x, ids"),
    ],
)
def test_names_must_be_those_of_the_inputs(
    arrays: dict[str, Any], hint: str, tmp_path: Path
) -> None:
    error = _refusal(_saved(tmp_path, **arrays))
    assert error.hint == hint
    assert "and the model takes x float32[b, 4], ids int64[b]" in error.message


def test_an_input_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    model = _model("float[b, 4] x, int64[b] ids", {"ids": IDS})
    path = _saved(tmp_path, x=X)
    (feeds,) = open_array_files(path, read_signature(model), SampleOptions())
    assert list(feeds) == ["x"]


@pytest.mark.parametrize("positional", [True, False])
def test_one_array_needs_no_name_for_one_input(positional: bool, tmp_path: Path) -> None:
    if positional:
        np.savez(tmp_path / "a.npz", X)
    else:
        np.save(tmp_path / "a.npy", X)
    path = tmp_path / ("a.npz" if positional else "a.npy")
    (feeds,) = _open(path, "float[b, 4] images")
    np.testing.assert_array_equal(feeds["images"], X)
    assert "one array without a name" in _refusal(path).message


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        shape = (number, 4)  # ragged: the batch differs between files
        np.savez(
            tmp_path / f"s{number}.npz",
            x=np.full(shape, number, np.float32),
            ids=np.zeros(number, np.int64),
        )
    samples = _open(tmp_path)
    assert [feeds["x"].shape for feeds in samples] == [(1, 4), (2, 4), (10, 4)]
    assert samples.origin == f"3 calls from {tmp_path.name}/ (3 of 3 files)"
    few = _open(tmp_path, max_samples=2)
    assert [feeds["x"].shape[0] for feeds in few] == [1, 2]
    assert few.origin == f"2 calls from {tmp_path.name}/ (2 of 3 files)"


def test_a_wrong_file_of_a_folder_is_named_at_once(tmp_path: Path) -> None:
    np.savez(tmp_path / "1.npz", x=X, ids=IDS)
    np.savez(tmp_path / "2.npz", x=X)
    with pytest.raises(UsageError) as caught:
        _open(tmp_path)
    assert caught.value.where == str(tmp_path / "2.npz")


def test_a_folder_without_arrays_is_refused(tmp_path: Path) -> None:
    assert _refusal(tmp_path).message == "holds no .npz or .npy file"


def test_opening_reads_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _saved(tmp_path, ids=np.stack([IDS] * 3), x=np.stack([X] * 3))
    read = []
    real = np.empty

    def recorded(shape: tuple[int, ...], dtype: Any) -> Any:
        read.append(shape)
        return real(shape, dtype)

    monkeypatch.setattr(np, "empty", recorded)
    samples = _open(path)
    assert read == []
    next(iter(samples))
    assert sorted(read) == [(1, 2), (1, 2, 4)]


def test_compressed_stacks_stream_too(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "c.npz", ids=np.stack([IDS] * 3), x=np.stack([X, X + 1, X + 2]))
    assert [feeds["x"][0, 0] for feeds in _open(tmp_path / "c.npz")] == [0, 1, 2]


def test_two_readings_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    samples = _open(_saved(tmp_path, ids=np.stack([IDS] * 3), x=np.stack([X, X + 1, X + 2])))
    pairs = list(zip(samples, samples, strict=True))
    assert all(np.array_equal(a["x"], b["x"]) for a, b in pairs)


def test_a_call_above_the_limit_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path, x=np.zeros((1000, 4), np.float32), ids=np.arange(1000))
    error = _refusal(path, max_bytes=10_000)
    assert (
        error.message == "a call needs 24000 bytes in memory at once, more than the limit of 10000"
    )
    assert len(_open(path, max_bytes=10_000, batch_size=100)) == 10


def test_a_bomb_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 4)}
    )
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(1 << 20))
        archive.writestr("ids.npy", b"")
    assert "not what the file holds" in _refusal(tmp_path / "b.npz").message


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path, x=np.array([{"a": 1}], object), ids=IDS)
    assert "it holds Python objects (pickled), which are never loaded" in _refusal(path).message
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], object))
    error = _refusal(tmp_path / "p.npy", "float[b] x")
    assert error.message.startswith("cannot be read as a .npy array: it holds Python objects")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_what_is_not_an_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(UsageError, match=PAIR):
        _open(tmp_path / "s.npz")


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez_compressed(path, x=X, ids=np.arange(1000))
    data = bytearray(path.read_bytes())
    data[60:120] = bytes(60)
    path.write_bytes(bytes(data))
    with pytest.raises(UsageError, match=PAIR):
        list(_open(path))


@pytest.mark.parametrize("name", ["readme.txt", "../x"])
def test_entries_that_are_no_arrays_are_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr(name, b"hello")
    with pytest.raises(UsageError, match="is no array, or there twice"):
        _open(tmp_path / "s.npz")


def test_a_file_that_changes_between_readings_is_refused(tmp_path: Path) -> None:
    samples = _open(_saved(tmp_path, x=X, ids=IDS))
    _saved(tmp_path, x=X[:1], ids=IDS[:1])
    with pytest.raises(UsageError, match="it changed while it was being used"):
        list(samples)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        _open(tmp_path / "none.npz")


def test_an_input_of_unknown_rank_gets_the_array_whole(tmp_path: Path) -> None:
    model = _model("float[b, 4] x, float[1] any")
    model.graph.inputs[1].shape = None
    path = _saved(tmp_path, x=np.stack([X] * 2), any=np.zeros((3, 3, 3), np.float32))
    calls = list(open_array_files(path, read_signature(model), SampleOptions()))
    assert [feeds["any"].shape for feeds in calls] == [(3, 3, 3)] * 2
