"""What a source is taken for, and the calls every source makes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.samples import (
    KINDS,
    SampleOptions,
    Samples,
    load_feeds,
    open_samples,
    synthetic_feeds,
    warnings,
)
from qcompiler.errors import UsageError
from tests.support.graphs import build

X = np.ones((2, 4), np.float32)
IDS = np.zeros((2,), np.int64)


def _model() -> ir.Model:
    return build(
        "g (float[b, 4] x, int64[b] ids) => (float[b, 4] y, int64[b] z)"
        "{ y = Relu(x) z = Identity(ids) }"
    )


def _open(source: str | Path, **options: Any) -> Samples:
    return open_samples(str(source), _model(), SampleOptions(**options))


def _refusal(source: str | Path, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        _open(source, **options)
    return caught.value


def test_a_file_can_be_forced_to_a_kind(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=X, ids=IDS)
    assert len(_open(tmp_path / "data.npz")) == 1
    assert len(_open(f"arrays:{tmp_path / 'data.npz'}")) == 1
    assert "cannot be read as Polygraphy" in _refusal(f"polygraphy:{tmp_path}/data.npz").message


def test_a_name_without_meaning_is_refused_with_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    error = _refusal(tmp_path / "data.csv")
    assert error.message == "its name does not say what it is"
    assert error.hint
    assert all(kind in error.hint for kind in KINDS)


@pytest.mark.parametrize("source", ["none.csv", "nowhere/", "nowhere"])
def test_what_is_not_there_is_refused(source: str) -> None:
    assert "there is no such file" in _refusal(source).message


@pytest.mark.parametrize("source", ["none.npz", "images:nowhere", "text:none.txt"])
def test_what_is_not_there_is_refused_whatever_its_kind(source: str) -> None:
    assert _refusal(source).message == "there is no such file or folder"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert _refusal(tmp_path).message == "holds nothing that can be read"


def test_a_folder_of_two_kinds_is_refused_with_how_to_choose(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, ids=IDS)
    (tmp_path / "a.png").write_bytes(b"")
    error = _refusal(tmp_path)
    assert error.message == "holds both arrays and images"
    assert error.hint == f"arrays:{tmp_path} or images:{tmp_path}"
    assert len(_open(f"arrays:{tmp_path}")) == 1


def test_a_folder_is_recognized_by_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, ids=IDS)
    assert _open(tmp_path).origin == f"1 call from {tmp_path.name}/ (1 of 1 files)"


@pytest.mark.parametrize("option", ["max_samples", "batch_size", "sequence_length", "max_bytes"])
def test_options_below_one_are_refused(option: str) -> None:
    error = _refusal("random", **{option: 0})
    assert (error.where, error.message) == (option, "is 0, and must be at least 1")


def test_random_says_that_it_is_made_up() -> None:
    samples = _open("random:3", seed=5, symbolic_size=7)
    assert samples.made_up
    assert samples.origin == "3 random calls (seed 5, symbolic dimensions 7)"
    first, second, _ = samples
    assert first["x"].shape == (7, 4)
    assert not np.array_equal(first["x"], second["x"])


def test_random_without_a_number_has_eight_calls_at_most_max_samples() -> None:
    assert len(_open("random")) == len(list(_open("random"))) == 8
    assert len(_open("random", max_samples=3)) == 3


@pytest.mark.parametrize("number", ["0", "x", "-1", "²"])
def test_random_takes_a_number(number: str) -> None:
    assert f"{number!r} is no number of calls" == _refusal(f"random:{number}").message


def test_the_first_call_of_a_file_is_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", ids=np.stack([IDS, IDS + 1]), x=np.stack([X, X + 1]))
    feeds = load_feeds(tmp_path / "s.npz", _model())
    assert list(feeds) == ["x", "ids"]
    np.testing.assert_array_equal(feeds["x"], X)


def test_the_fingerprint_is_that_of_the_data(tmp_path: Path) -> None:
    def fingerprint(name: str, **arrays: Any) -> str:
        np.savez(tmp_path / name, **arrays)
        return _open(tmp_path / name).fingerprint()

    first = fingerprint("a.npz", x=X, ids=IDS)
    assert first == fingerprint("b.npz", ids=IDS, x=X)
    assert first == fingerprint("c.npz", x=X.astype(np.float64), ids=IDS.astype(np.int32))
    assert first == fingerprint("d.npz", x=X[None], ids=IDS[None])
    assert first != fingerprint("e.npz", x=X, ids=IDS + 1)
    assert first != fingerprint("f.npz", x=X.reshape(1, 2, 4)[:, :1], ids=IDS[None])
    assert len(first) == 64
    assert int(first, 16)


def test_the_fingerprint_does_not_depend_on_how_often_it_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, ids=IDS)
    samples = _open(tmp_path / "a.npz")
    list(samples)
    assert samples.fingerprint() == samples.fingerprint() == _open(tmp_path / "a.npz").fingerprint()


def test_made_up_inputs_follow_the_signature() -> None:
    feeds = synthetic_feeds(_model(), seed=3)
    assert feeds["x"].shape == (4, 4)
    assert feeds["x"].dtype == np.dtype(np.float32)
    assert feeds["ids"].tolist() == [1, 1, 1, 1]
    np.testing.assert_array_equal(feeds["x"], synthetic_feeds(_model(), seed=3)["x"])
    assert not np.array_equal(feeds["x"], synthetic_feeds(_model(), seed=4)["x"])


@pytest.mark.parametrize(
    ("mask", "past", "length"),
    [("total", "past", 10), ("total", "3", 8), ("T", "past", 5), ("9", "past", 9)],
)
def test_a_made_up_mask_is_as_long_as_cache_and_new_tokens(
    mask: str, past: str, length: int
) -> None:
    model = build(
        f"""g (int64[1, T] input_ids, int64[1, {mask}] attention_mask,
            float[1, 2, {past}, 4] past_key_values_0) => (int64[1, T] y) {{
            y = Identity(input_ids) }}"""
    )
    feeds = synthetic_feeds(model, seed=0, symbolic_size=5)
    assert feeds["input_ids"].shape == (1, 5)
    assert feeds["attention_mask"].shape == (1, length)


def test_a_made_up_mask_without_a_cache_has_the_size_of_all() -> None:
    text = "g (int64[1, T] attention_mask, int64[1] past) => (int64[1] y) { y = Identity(past) }"
    assert synthetic_feeds(build(text), seed=0)["attention_mask"].shape == (1, 4)


def test_no_text_is_made_up() -> None:
    model = build("g (string[n] s) => (string[n] t) { t = Identity(s) }")
    with pytest.raises(UsageError, match="input s: is a string tensor"):
        synthetic_feeds(model, seed=0)
    with pytest.raises(UsageError, match="input s: is a string tensor"):
        open_samples("random", model, SampleOptions())


def test_warnings_are_reachable_from_here(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, ids=IDS)
    (found,) = warnings(_open(tmp_path / "a.npz"))
    assert found.startswith("input x is 1 everywhere in 1 call")
