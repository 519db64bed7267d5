"""Statistics on disk."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.calibration.statistics import (
    Statistics,
    TensorAccumulator,
    TensorStatistics,
    Wanted,
)
from qcompiler.calibration.statistics_file import load_statistics, save_statistics
from qcompiler.errors import UsageError
from tests.support.graphs import random_array


def tensor(*, histogram: bool = True, axis: int | None = 1, scale: float = 1.0) -> TensorStatistics:
    accumulator = TensorAccumulator(histogram=histogram, channel_axis=axis)
    accumulator.add_values(random_array(20, 3) * np.float32(scale))
    return accumulator.finish()


def sample() -> Statistics:
    overflown = TensorStatistics(2, -1e30, 1e30, 0.0, float("inf"))
    tensors = {
        "a": tensor(),
        "b": tensor(histogram=False, scale=1e-3),
        "größe/ü": tensor(axis=None),
        "c": overflown,
        "empty": TensorAccumulator(histogram=True, channel_axis=None).finish(),
    }
    return Statistics(tensors, "m" * 64, "s" * 64, 7)


def rewritten(path: Path, change: Callable[[Any], None]) -> None:
    """Change the header of a file, with a checksum that fits."""
    _, header, data = path.read_bytes().split(b"\n", 2)
    content = json.loads(header)
    change(content)
    body = json.dumps(content).encode() + b"\n" + data
    digest = hashlib.sha256(body).hexdigest().encode()
    path.write_bytes(b"qcompiler-statistics " + digest + b"\n" + body)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_statistics(sample(), tmp_path / "s.stats")
    return tmp_path / "s.stats"


def test_what_is_saved_comes_back(path: Path) -> None:
    saved, loaded = sample(), load_statistics(path)
    assert list(loaded.tensors) == sorted(saved.tensors)
    assert (loaded.model_fingerprint, loaded.samples_fingerprint) == ("m" * 64, "s" * 64)
    assert loaded.calls == 7
    for name, one in saved.tensors.items():
        other = loaded.tensors[name]
        for field in ("count", "minimum", "maximum", "total", "total_squares"):
            assert getattr(one, field) == getattr(other, field)
        np.testing.assert_array_equal(one.channel_minimum, other.channel_minimum)
        np.testing.assert_array_equal(one.channel_maximum, other.channel_maximum)
        assert (one.histogram is None) == (other.histogram is None)
        if one.histogram is not None and other.histogram is not None:
            np.testing.assert_array_equal(one.histogram.bins, other.histogram.bins)
            np.testing.assert_array_equal(one.histogram.counts, other.histogram.counts)
            np.testing.assert_array_equal(one.histogram.centers, other.histogram.centers)


def test_bytes_are_the_same_every_time(path: Path, tmp_path: Path) -> None:
    save_statistics(load_statistics(path), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again", "s.stats"]


def test_the_same_origin_is_taken(path: Path) -> None:
    load_statistics(path, model_fingerprint="m" * 64, samples_fingerprint="s" * 64)


@pytest.mark.parametrize(
    ("model", "samples", "message"),
    [
        ("x", "s" * 64, "another model than the one given; the samples are the same"),
        ("m" * 64, "x", "other samples than the ones given; the model is the same"),
        ("x", "y", "another model and other samples than the ones given"),
        ("x", None, "another model than the one given"),
        (None, "x", "other samples than the ones given"),
    ],
)
def test_another_origin_is_refused(
    path: Path, model: str | None, samples: str | None, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load_statistics(path, model_fingerprint=model, samples_fingerprint=samples)
    assert caught.value.message == f"was collected from {message}"
    assert caught.value.where == str(path)
    assert caught.value.hint


def test_every_cut_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    for length in [*range(0, 200, 7), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(UsageError, match="is no statistics file, or a damaged one"):
            load_statistics(path)


def test_every_flipped_byte_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="is no statistics file, or a damaged one"):
            load_statistics(path)


def set_row(key: str, value: Any) -> Callable[[Any], None]:
    def change(header: Any) -> None:
        header["tensors"][0][key] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_row("bins", 1 << 60),
        set_row("bins", -1),
        set_row("bins", 2.5),
        set_row("channels", 1 << 60),
        set_row("channels", 2),
        set_row("count", 5),
        set_row("numbers", [1.0, 2.0]),
        set_row("numbers", [2.0, 1.0, 0.0, 0.0]),
        set_row("numbers", [float("nan"), 1.0, 0.0, 0.0]),
        set_row("name", 3),
        lambda header: header.pop("tensors"),
        lambda header: header.update(tensors=7),
        lambda header: header.update(calls="many"),
        lambda header: header["tensors"].pop(),
        lambda header: header["tensors"].pop(0),
    ],
)
def test_a_header_that_cannot_be_is_refused(path: Path, change: Callable[[Any], None]) -> None:
    rewritten(path, change)
    with pytest.raises(UsageError, match="is no statistics file, or a damaged one"):
        load_statistics(path)


def test_another_format_version_is_named(path: Path) -> None:
    rewritten(path, lambda header: header.update(version=9))
    with pytest.raises(UsageError, match="is of format 9, and this version reads format 1"):
        load_statistics(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_statistics(tmp_path / "none")
    with pytest.raises(UsageError, match="cannot be read"):
        load_statistics(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        save_statistics(sample(), tmp_path / "none" / "s.stats")


@pytest.mark.parametrize(
    ("want", "message"),
    [
        (Wanted("aa"), "has no statistics of aa; nearest: a"),
        (Wanted("b", histogram=True), "has only the extremes of b"),
        (Wanted("größe/ü", channel_axis=0), "has no extremes per channel of größe/ü"),
    ],
)
def test_what_is_missing_is_named(want: Wanted, message: str) -> None:
    sample().require([Wanted("a", histogram=True, channel_axis=1)])
    with pytest.raises(UsageError, match=message):
        sample().require([Wanted("a"), want], "file")
