"""Samples from ONNX test data sets."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import SampleOptions, Samples
from qcompiler.calibration.samples import open_samples
from qcompiler.errors import UsageError
from tests.support.graphs import build

X = np.arange(8, dtype=np.float32).reshape(2, 4)
IDS = np.array([5, 6])


def _model() -> ir.Model:
    return build(
        "g (float[b, 4] x, int64[b] ids, float[1] k) => (float y)"
        "{ y = Constant<value_float=1.0>() }",
        {"k": np.ones(1, np.float32)},
    )


def _open(folder: Path, **options: Any) -> Samples:
    return open_samples(str(folder), _model(), SampleOptions(**options))


def _write(folder: Path, *arrays: Any, names: tuple[str, ...] = ("", "", "")) -> Path:
    folder.mkdir(exist_ok=True)
    for index, array in enumerate(arrays):
        tensor = onnx.numpy_helper.from_array(array, names[index])
        (folder / f"input_{index}.pb").write_bytes(tensor.SerializeToString())
    return folder


def _refusal(folder: Path, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        list(_open(folder, **options))
    return caught.value


def test_data_sets_are_calls_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 0, 2):
        _write(tmp_path / f"test_data_set_{number}", X + number, IDS)
        (tmp_path / f"test_data_set_{number}" / "output_0.pb").write_bytes(b"not read")
    samples = _open(tmp_path)
    assert [feeds["x"][0, 0] for feeds in samples] == [0, 2, 10]
    assert samples.origin == f"3 calls from {tmp_path.name}/ (3 of 3 data sets)"
    assert len(_open(tmp_path, max_samples=2)) == 2


def test_one_data_set_can_be_named(tmp_path: Path) -> None:
    (feeds,) = _open(_write(tmp_path / "set", X, IDS))
    assert feeds["ids"].tolist() == [5, 6]


def test_tensors_are_matched_by_name_when_all_have_one(tmp_path: Path) -> None:
    (feeds,) = _open(_write(tmp_path / "set", IDS, X, names=("ids", "x")))
    assert list(feeds) == ["x", "ids"]
    np.testing.assert_array_equal(feeds["x"], X)


def test_tensors_with_other_names_are_matched_by_order(tmp_path: Path) -> None:
    (feeds,) = _open(_write(tmp_path / "set", X, IDS, names=("gpu_0/data_0", "x")))
    np.testing.assert_array_equal(feeds["x"], X)


def test_inputs_with_defaults_are_counted_last(tmp_path: Path) -> None:
    (feeds,) = _open(_write(tmp_path / "set", X, IDS, np.zeros(1, np.float32)))
    assert list(feeds) == ["x", "ids", "k"]


def test_more_tensors_than_inputs_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", X, IDS)
    _write(tmp_path / "set", X, IDS, X)
    (folder / "input_2.pb").rename(folder / "input_7.pb")
    assert "holds input_7.pb, and the model takes x float32[b, 4]" in _refusal(folder).message


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    assert _refusal(_write(tmp_path / "set", X)).hint == "missing: ids"


def test_bfloat16_and_text_are_read(tmp_path: Path) -> None:
    model = build("g (bfloat16[2] x, string[2] s) => (float y) { y = Constant<value_float=1.0>() }")
    x = np.array([1, 2], ml_dtypes.bfloat16)
    folder = _write(tmp_path / "set", x, np.array(["a", "bü"], object))
    (feeds,) = open_samples(str(folder), model, SampleOptions())
    assert feeds["x"].dtype == np.dtype(ml_dtypes.bfloat16)
    assert feeds["s"].tolist() == ["a", "bü"]


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"junk" * 9])
def test_a_damaged_tensor_is_named(content: bytes, tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", X, IDS)
    (folder / "input_1.pb").write_bytes(content)
    error = _refusal(folder)
    assert error.where == str(folder / "input_1.pb")
    assert error.message.startswith("cannot be read as a tensor: ")


@pytest.mark.parametrize("dims", [(1 << 40,), (3,), (-2,)])
def test_a_tensor_that_lies_about_its_shape_is_refused(
    dims: tuple[int, ...], tmp_path: Path
) -> None:
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=dims, raw_data=bytes(8))
    folder = _write(tmp_path / "set", X, IDS)
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    assert _refusal(folder).message.startswith("cannot be read as a tensor: ")


def test_data_in_other_files_is_not_followed(tmp_path: Path) -> None:
    tensor = onnx.numpy_helper.from_array(X)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    folder = _write(tmp_path / "set", X, IDS)
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    assert "its data is in another file, which is not followed" in _refusal(folder).message


def test_a_set_above_the_limit_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", X, IDS)
    assert _refusal(folder, max_bytes=20).message.endswith("more than the limit of 20")


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_data_set_0").mkdir()
    assert _refusal(tmp_path).message == "holds no input_N.pb file"
