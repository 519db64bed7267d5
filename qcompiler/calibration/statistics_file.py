"""The file that statistics are kept in between compilations.

Three parts: a line with the name of the format and the SHA-256 of the rest, a line of JSON, and
the arrays it lists, back to back and little-endian. Equal statistics make equal bytes. Nothing in
it is code, and every size is held against the size of the file before an array is made.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.histogram import Histogram
from qcompiler.calibration.statistics import Statistics, TensorStatistics
from qcompiler.errors import UsageError
from qcompiler.ir.atomic_file import AtomicFile
from qcompiler.ir.weights import disk_errors

Array = npt.NDArray[Any]

_MAGIC: Final = b"qcompiler-statistics "
_VERSION: Final = 1
_DIGEST_CHARACTERS: Final = 64
_LARGEST: Final = 1 << 30
"""Bytes of a file that is believed: 1,000 values with all bins in use take 0.65 GB."""
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)
"""What reading a header of the wrong structure raises; JSON faults are ValueErrors."""


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write statistics; the file appears complete or not at all.

    Raises:
        UsageError: The folder cannot be written.
    """
    rows, arrays = [], []
    for name, tensor in sorted(statistics.tensors.items()):
        row, own = _row_of(name, tensor)
        rows.append(row)
        arrays += own
    header = {
        "version": _VERSION,
        "model": statistics.model_fingerprint,
        "samples": statistics.samples_fingerprint,
        "calls": statistics.calls,
        "tensors": rows,
    }
    body = json.dumps(header, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    body += b"".join(arrays)
    digest = hashlib.sha256(body).hexdigest().encode()
    with disk_errors(path.absolute().parent), AtomicFile(path) as file:
        file.stream().write(_MAGIC + digest + b"\n" + body)
        file.commit()


def load_statistics(
    path: Path, *, model_fingerprint: str | None = None, samples_fingerprint: str | None = None
) -> Statistics:
    """Read what `save_statistics` wrote.

    Args:
        path: The file.
        model_fingerprint: Of the model they shall belong to; None takes any.
        samples_fingerprint: Of the samples they shall come from; None takes any.

    Raises:
        UsageError: It cannot be read, is damaged or something else, or belongs to another model
            or other samples.
    """
    body = _read_body(path)
    line, _, data = body.partition(b"\n")
    try:
        header = json.loads(line)
        version = header["version"]
    except _MALFORMED as error:
        raise _damaged(path, "its header cannot be read") from error
    if version != _VERSION:
        message = f"is of format {version}, and this version reads format {_VERSION}"
        raise UsageError(message, where=str(path), hint="collect the statistics again")
    try:
        statistics = _parse(header, data)
    except _MALFORMED as error:
        raise _damaged(path, "its header and its data do not fit together") from error
    _check_origin(statistics, path, model_fingerprint, samples_fingerprint)
    return statistics


def _read_body(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise _damaged(path, f"it has {size} bytes, more than any such file")
        content = path.read_bytes()
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise UsageError(message, where=str(path)) from error
    start = len(_MAGIC) + _DIGEST_CHARACTERS + 1
    if not content.startswith(_MAGIC):
        raise _damaged(path, "it is something else")
    body = content[start:]
    if content[len(_MAGIC) : start - 1] != hashlib.sha256(body).hexdigest().encode():
        raise _damaged(path, "its checksum is wrong")
    return body


def _damaged(path: Path, reason: str) -> UsageError:
    message = f"is no statistics file, or a damaged one: {reason}"
    return UsageError(message, where=str(path), hint="collect the statistics again")


def _check_origin(
    statistics: Statistics, path: Path, model: str | None, samples: str | None
) -> None:
    model_changed = model not in (None, statistics.model_fingerprint)
    samples_changed = samples not in (None, statistics.samples_fingerprint)
    if not (model_changed or samples_changed):
        return
    if model_changed and samples_changed:
        what = "another model and other samples than the ones given"
    elif model_changed:
        what = "another model than the one given; the samples are the same"
    else:
        what = "other samples than the ones given; the model is the same"
    if samples is None:
        what = what.removesuffix("; the samples are the same")
    if model is None:
        what = what.removesuffix("; the model is the same")
    hint = "collect the statistics again, or give what they were collected from"
    message = f"was collected from {what}"
    raise UsageError(message, where=str(path), hint=hint)


def _row_of(name: str, tensor: TensorStatistics) -> tuple[dict[str, Any], list[bytes]]:
    """Return what the header says of a tensor, and its arrays as bytes."""
    row: dict[str, Any] = {
        "name": name,
        "count": tensor.count,
        # Python writes the shortest text that reads back as the same number.
        "numbers": [tensor.minimum, tensor.maximum, tensor.total, tensor.total_squares],
    }
    arrays: list[bytes] = []
    if tensor.channel_minimum is not None and tensor.channel_maximum is not None:
        row["channels"] = len(tensor.channel_minimum)
        arrays += [
            tensor.channel_minimum.astype("<f8").tobytes(),
            tensor.channel_maximum.astype("<f8").tobytes(),
        ]
    if tensor.histogram is not None:
        row["bins"] = len(tensor.histogram.bins)
        row["exact"] = tensor.histogram.exact
        arrays += [
            tensor.histogram.bins.astype("<u2").tobytes(),
            tensor.histogram.counts.astype("<i8").tobytes(),
        ]
    return row, arrays


class _Arrays:
    """Hands out arrays from the data of a file, front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: Any, dtype: str) -> Array:
        """Return the next `count` numbers.

        Raises:
            ValueError: There are not so many.
        """
        size = np.dtype(dtype).itemsize * _natural(count)
        if size > len(self._data) - self._at:
            message = "the data is too short"
            raise ValueError(message)
        part = self._data[self._at : self._at + size]
        self._at += size
        return np.frombuffer(part, dtype).astype(np.dtype(dtype).newbyteorder("="))

    def end(self) -> None:
        """Check that nothing is left.

        Raises:
            ValueError: Something is.
        """
        if self._at != len(self._data):
            message = "the data is too long"
            raise ValueError(message)


def _parse(header: dict[str, Any], data: bytes) -> Statistics:
    arrays = _Arrays(data)
    tensors: dict[str, TensorStatistics] = {}
    for row in header["tensors"]:
        tensors[_text(row["name"])] = _tensor_of(row, arrays)
    arrays.end()
    return Statistics(
        tensors, _text(header["model"]), _text(header["samples"]), _natural(header["calls"])
    )


def _tensor_of(row: dict[str, Any], arrays: _Arrays) -> TensorStatistics:
    count = _natural(row["count"])
    low, high, total, squares = (float(number) for number in row["numbers"])
    if not (np.isfinite([low, high]).all() and low <= high):
        message = "extremes out of order"
        raise ValueError(message)
    channels: tuple[Array | None, Array | None] = (None, None)
    if "channels" in row:
        channels = arrays.take(row["channels"], "<f8"), arrays.take(row["channels"], "<f8")
    histogram = None
    if "bins" in row:
        bins, counts = arrays.take(row["bins"], "<u2"), arrays.take(row["bins"], "<i8")
        histogram = Histogram(bins, counts, low, high, bool(row["exact"]))
        if (counts <= 0).any() or histogram.count != count or not histogram.is_ordered:
            message = "a histogram that cannot be"
            raise ValueError(message)
    return TensorStatistics(count, low, high, total, squares, histogram, *channels)


def _natural(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        message = f"{number!r} is no count"
        raise ValueError(message)
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        message = f"{value!r} is no text"
        raise TypeError(message)
    return value
