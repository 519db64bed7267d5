"""Samples from ONNX test data: `test_data_set_*/input_N.pb`, as the ONNX model zoo has them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError

from qcompiler.calibration.calls import Feeds, SampleOptions, Samples, counted
from qcompiler.calibration.folder_files import list_files, natural_key
from qcompiler.calibration.signature import Signature
from qcompiler.errors import UsageError

_SET = re.compile(r"test_data_set_\d+")
_INPUT = re.compile(r"input_(\d+)\.pb")


def is_test_data(folder: Path) -> bool:
    """Whether a folder holds `input_N.pb` files, or folders called `test_data_set_N`."""
    return any(
        _INPUT.fullmatch(p.name) or (_SET.fullmatch(p.name) and p.is_dir())
        for p in folder.iterdir()
    )


def open_test_data(folder: Path, signature: Signature, options: SampleOptions) -> Samples:
    """Open a folder with test data sets, each of which is one call; or a single set.

    A tensor is for the input of its name if every tensor of the set has the name of an input;
    otherwise `input_N.pb` is for the N-th input that has no default.

    Raises:
        UsageError: There are none, one cannot be read, or does not fit the model.
    """
    sets = [p for p in folder.iterdir() if _SET.fullmatch(p.name) and p.is_dir()]
    sets = sorted(sets, key=lambda p: natural_key(p.name)) or [folder]
    files = [_input_files(each) for each in sets[: options.max_samples]]

    def read() -> Iterator[Feeds]:
        for each, paths in zip(sets, files, strict=False):
            arrays = _named(_read_set(paths, options.max_bytes), signature, each)
            yield signature.feeds(arrays, str(each))

    calls = counted(len(files), "call")
    origin = f"{calls} from {folder.name}/ ({len(files)} of {counted(len(sets), 'data set')})"
    return Samples(origin, False, len(files), read)


def _input_files(folder: Path) -> list[tuple[int, Path]]:
    numbered = [(_INPUT.fullmatch(p.name), p) for p in list_files(folder, {".pb"})]
    files = [(int(match[1]), path) for match, path in numbered if match]
    if not files:
        message = "holds no input_N.pb file"
        raise UsageError(message, where=str(folder), hint="each is a serialized TensorProto")
    return files


def _read_set(files: list[tuple[int, Path]], limit: int) -> dict[int, tuple[str, npt.NDArray[Any]]]:
    total = sum(path.stat().st_size for _, path in files)
    if total > limit:
        message = f"takes {total} bytes, more than the limit of {limit}"
        raise UsageError(message, where=str(files[0][1].parent))
    return {number: _read_tensor(path) for number, path in files}


def _read_tensor(path: Path) -> tuple[str, npt.NDArray[Any]]:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        array = _to_array(tensor)
    except (OSError, DecodeError, ValueError, TypeError, KeyError, MemoryError) as error:
        message = f"cannot be read as a tensor: {str(error) or type(error).__name__}"
        hint = "input_N.pb is one serialized TensorProto; sequences and optionals are not read"
        raise UsageError(message, where=str(path), hint=hint) from error
    return tensor.name, array


def _to_array(tensor: onnx.TensorProto) -> npt.NDArray[Any]:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        message = "its data is in another file, which is not followed"
        raise ValueError(message)
    if any(dim < 0 for dim in tensor.dims):
        message = f"its shape is {list(tensor.dims)}"
        raise ValueError(message)
    array: npt.NDArray[Any] = onnx.numpy_helper.to_array(tensor)
    return array.astype(np.str_) if tensor.data_type == onnx.TensorProto.STRING else array


def _named(
    tensors: dict[int, tuple[str, npt.NDArray[Any]]], signature: Signature, where: Path
) -> dict[str, npt.NDArray[Any]]:
    known = {i.name for i in signature.inputs}
    names = [name for name, _ in tensors.values()]
    if set(names) <= known and len(set(names)) == len(names):
        return dict(tensors.values())
    ordered = [i.name for i in (*signature.required, *signature.inputs) if i.name in known]
    ordered = list(dict.fromkeys(ordered))
    if max(tensors) >= len(ordered):
        message = f"holds input_{max(tensors)}.pb, and the model takes {signature}"
        raise UsageError(message, where=str(where), hint="inputs are counted from 0")
    return {ordered[number]: array for number, (_, array) in tensors.items()}
