"""Samples from Polygraphy's input files."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import SampleOptions, Samples
from qcompiler.calibration.samples import open_samples
from qcompiler.errors import UsageError
from tests.support.graphs import build

X = np.arange(8, dtype=np.float32).reshape(2, 4)
IDS = np.array([5, 6])


def _model() -> ir.Model:
    return build("g (float[b, 4] x, int64[b] ids) => (float y) { y = Constant<value_float=1.0>() }")


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _encoded(array: Any) -> dict[str, Any]:
    return {"array": base64.b64encode(_npy(array)).decode(), "polygraphy_class": "ndarray"}


def _call(add: float = 0) -> dict[str, Any]:
    return {"x": _encoded(X + np.float32(add)), "ids": _encoded(IDS)}


def _saved(tmp_path: Path, content: Any, **how: Any) -> Path:
    path = tmp_path / "inputs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, **how))
    return path


def _open(path: Path, **options: Any) -> Samples:
    return open_samples(str(path), _model(), SampleOptions(**options))


def _refusal(path: Path, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        list(_open(path, **options))
    return caught.value


@pytest.mark.parametrize("how", [{}, {"indent": 4}, {"separators": (",", ":")}])
def test_each_element_is_a_call(how: dict[str, Any], tmp_path: Path) -> None:
    samples = _open(_saved(tmp_path, [_call(0), _call(1), _call(2)], **how))
    assert [feeds["x"][0, 0] for feeds in samples] == [0, 1, 2]
    assert samples.origin == "3 calls from inputs.json"


def test_max_samples_takes_the_first(tmp_path: Path) -> None:
    samples = _open(_saved(tmp_path, [_call(0), _call(1), _call(2)]), max_samples=2)
    assert len(list(samples)) == len(samples) == 2
    assert samples.origin == "2 calls from inputs.json (of 3)"


def test_a_file_written_by_polygraphy_is_read(tmp_path: Path) -> None:
    # As `polygraphy.json.save_json([{"ids": np.array([1, 2])}], ...)` of 0.53.6 writes it.
    header = base64.b64decode(
        "k05VTVBZAQB2AHsnZGVzY3InOiAnPGk4JywgJ2ZvcnRyYW5fb3JkZXInOiBGYWxzZSwgJ3NoYXBlJzogKDIsKSwg"
        "fSAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIAo="
    )
    ids = base64.b64encode(header + np.array([1, 2]).tobytes()).decode()
    entry = {"array": ids, "polygraphy_class": "ndarray"}
    (feeds,) = _open(_saved(tmp_path, [{"x": _encoded(X), "ids": entry}], indent=4))
    assert feeds["ids"].tolist() == [1, 2]


def test_older_forms_are_read(tmp_path: Path) -> None:
    old = {"__polygraphy_encoded_ndarray": "polygraphy_serialized_json_type"}
    call = {
        "x": {"array": _npy(X).decode("latin-1"), **old},
        "ids": {"values": _encoded(IDS), "polygraphy_class": "LazyNumpyArray"},
    }
    (feeds,) = _open(_saved(tmp_path, [call]))
    np.testing.assert_array_equal(feeds["x"], X)
    assert feeds["ids"].tolist() == [5, 6]


def test_brackets_and_quotes_in_names_do_not_confuse(tmp_path: Path) -> None:
    model = build("g (float[b, 4] x) => (float y) { y = Constant<value_float=1.0>() }")
    name = 'a"]},[\\'
    model.graph.inputs[0].name = name
    path = _saved(tmp_path, [{name: _encoded(X)}, {name: _encoded(X)}])
    assert len(list(open_samples(str(path), model, SampleOptions()))) == 2


def test_only_the_calls_that_are_read_are_decoded(tmp_path: Path) -> None:
    broken = {"x": {"array": "!", "polygraphy_class": "ndarray"}, "ids": _encoded(IDS)}
    samples = _open(_saved(tmp_path, [_call(), broken]))
    calls = iter(samples)
    next(calls)
    with pytest.raises(UsageError, match="element 1: "):
        next(calls)


def test_torch_tensors_are_pickles_and_refused(tmp_path: Path) -> None:
    tensor = {"array": "gAI=", "polygraphy_class": "Tensor"}
    error = _refusal(_saved(tmp_path, [{"x": tensor, "ids": _encoded(IDS)}]))
    assert "x is a Tensor, and only NumPy arrays are read (others are pickled)" in error.message


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    pickled = _encoded(np.array([{"a": 1}], object))
    error = _refusal(_saved(tmp_path, [{"x": pickled, "ids": _encoded(IDS)}]))
    assert "it holds Python objects (pickled), which are never loaded" in error.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "cannot mmap an empty file"),
        ("{}", "it is no JSON list"),
        ('"text"', "it is no JSON list"),
        ("[{}", "its list does not end"),
        ("x[]", "it is no JSON list"),
        ("[]", "its list is empty"),
        (" [ \n ] ", "its list is empty"),
        ("[1]", "element 0: it is no map of input names to arrays"),
        ("[nonsense]", "element 0: Expecting value"),
        ('[{"x": 1}]', "element 0: x is no encoded array"),
        ('[{"x": {"array": 1}}]', "element 0: x is no encoded array"),
        ('[{"x": {"array": ""}}]', "x is a None, and only NumPy"),
        ("[" + "[" * 100_000 + "]" * 100_000 + "]", "element 0: "),
    ],
)
def test_other_files_are_refused(content: str, reason: str, tmp_path: Path) -> None:
    error = _refusal(_saved(tmp_path, content))
    assert error.message.startswith("cannot be read as Polygraphy inputs: ")
    assert reason in error.message


def test_a_mismatch_names_the_element(tmp_path: Path) -> None:
    path = _saved(tmp_path, [_call(), {"x": _encoded(X)}])
    error = _refusal(path)
    assert error.where == f"{path}, element 1"
    assert error.hint == "missing: ids"


def test_a_call_above_the_limit_is_refused(tmp_path: Path) -> None:
    error = _refusal(_saved(tmp_path, [_call()]), max_bytes=100)
    assert error.message.endswith("bytes, more than the limit of 100")
