"""Samples from .npz and .npy files, and from folders of them.

How arrays become calls is decided by their number of dimensions alone:

- one more than the input has: calls stacked on the first axis;
- as many as the input has: one call, or what every call gets if other arrays hold several. The
  batch axis is split if it is a whole multiple of a batch that the model fixes, or if
  `batch_size` is given and the model's batch is symbolic.
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy.typing as npt

from qcompiler.calibration.calls import Feeds, SampleOptions, Samples, counted
from qcompiler.calibration.folder_files import list_files
from qcompiler.calibration.npy_stream import (
    UNREADABLE,
    Cut,
    Header,
    peak_bytes,
    read_header,
    read_pieces,
    require_size,
)
from qcompiler.calibration.signature import Input, Signature
from qcompiler.errors import UsageError, printable

SUFFIXES = frozenset({".npz", ".npy"})
_WHOLE = Cut()
_NAMELESS = "arr_0"
"""What np.savez calls an array that it got without a name."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """An array in a file: its place in the archive (None in a .npy file) and its division."""

    member: str | None
    header: Header
    cut: Cut = _WHOLE


@dataclass(frozen=True, slots=True)
class _ArrayFile:
    path: Path
    entries: Mapping[str, _Entry]
    calls: int
    rows: int

    def read(self, signature: Signature, calls: int) -> Iterator[Feeds]:
        """Yield the first calls."""
        with ExitStack() as stack:
            try:
                pieces = self._open(stack)
            except UNREADABLE as error:
                raise _unreadable(self.path, error) from error
            for _ in range(calls):
                try:
                    arrays = {name: next(piece) for name, piece in pieces.items()}
                except UNREADABLE as error:
                    raise _unreadable(self.path, error) from error
                yield signature.feeds(arrays, str(self.path))

    def _open(self, stack: ExitStack) -> dict[str, Iterator[npt.NDArray[Any]]]:
        archive = None
        if self.path.suffix.lower() == ".npz":
            archive = stack.enter_context(zipfile.ZipFile(self.path))
        pieces = {}
        for name, entry in self.entries.items():
            stream: IO[bytes]
            if archive is None or entry.member is None:
                stream, size = self.path.open("rb"), self.path.stat().st_size
            else:
                info = archive.getinfo(entry.member)
                stream, size = archive.open(info), info.file_size
            stack.enter_context(stream)
            if read_header(stream, size) != entry.header:
                message = "it changed while it was being used"
                raise ValueError(message)
            pieces[name] = read_pieces(stream, entry.header, entry.cut)
        return pieces


def open_array_files(path: Path, signature: Signature, options: SampleOptions) -> Samples:
    """Open a .npz or .npy file, or a folder of them, whose arrays are named as the inputs.

    An array without a name (.npy, or `arr_0` alone) is for a model with one required input. Only
    headers are read here; iterating reads one call at a time.

    Raises:
        UsageError: A file cannot be read, holds pickled objects, does not fit the model, or needs
            more than `max_bytes` for a call.
    """
    paths = list_files(path, SUFFIXES) if path.is_dir() else [path]
    used: list[tuple[_ArrayFile, int]] = []
    left = options.max_samples
    for each in paths:
        if left is not None and left <= 0:
            break
        file = _open_file(each, signature, options)
        calls = file.calls if left is None else min(file.calls, max(1, left // file.rows))
        left = None if left is None else left - calls * file.rows
        used.append((file, calls))
    if not used:
        message = "holds no .npz or .npy file"
        raise UsageError(message, where=str(path), hint="np.savez writes such a file")

    def read() -> Iterator[Feeds]:
        for file, calls in used:
            yield from file.read(signature, calls)

    count = sum(calls for _, calls in used)
    return Samples(_origin(path, used, len(paths), count), False, count, read)


def _origin(path: Path, used: list[tuple[_ArrayFile, int]], files: int, count: int) -> str:
    if path.is_dir():
        return f"{counted(count, 'call')} from {path.name}/ ({len(used)} of {files} files)"
    stored = used[0][0].calls
    return f"{counted(count, 'call')} from {path.name}" + (
        f" (of {stored})" if stored != count else ""
    )


def _open_file(path: Path, signature: Signature, options: SampleOptions) -> _ArrayFile:
    try:
        entries = _read_npz(path) if path.suffix.lower() == ".npz" else _read_npy(path)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    if set(entries) in ({""}, {_NAMELESS}):
        entries = {signature.only_name(str(path)): next(iter(entries.values()))}
    stored = {n: (e.header.dtype, e.header.shape) for n, e in entries.items()}
    signature.check_names(stored, str(path))
    entries = {
        name: replace(entry, cut=_cut(entry.header, signature.named(name), signature, options))
        for name, entry in entries.items()
    }
    entries = {
        name: _along(entry, entries) if signature.named(name).label else entry
        for name, entry in entries.items()
    }
    forms = {n: (e.header.dtype, e.cut.piece(e.header.shape)) for n, e in entries.items()}
    signature.check(forms, str(path), stored)
    calls = _count_calls(path, entries)
    try:
        require_size(sum(peak_bytes(e.header, e.cut) for e in entries.values()), options.max_bytes)
    except ValueError as error:
        message = f"a call {error}"
        hint = "batch_size makes calls smaller"
        raise UsageError(message, where=str(path), hint=hint) from error
    rows = max((e.cut.size for e in entries.values() if not e.cut.drop), default=1)
    return _ArrayFile(path, entries, calls, rows)


def _read_npz(path: Path) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename or name in entries:
                message = f"its entry {printable(info.filename)!r} is no array, or there twice"
                raise ValueError(message)
            with archive.open(info) as stream:
                entries[name] = _Entry(info.filename, read_header(stream, info.file_size))
    return entries


def _read_npy(path: Path) -> dict[str, _Entry]:
    with path.open("rb") as stream:
        return {"": _Entry(None, read_header(stream, path.stat().st_size))}


def _cut(header: Header, wanted: Input, signature: Signature, options: SampleOptions) -> Cut:
    if wanted.shape is None:
        return _WHOLE
    shape = header.shape
    if len(shape) == len(wanted.shape) + 1:
        return Cut(0, 1, drop=True)
    if len(shape) != len(wanted.shape) or not shape:
        return _WHOLE
    first = wanted.shape[0]
    if isinstance(first, int):
        whole = first > 0 and shape[0] > first and shape[0] % first == 0
        if whole:
            return Cut(0, first)
    axis = _batch_axis(wanted, signature)
    if options.batch_size is None or axis is None or shape[axis] <= options.batch_size:
        return _WHOLE
    return Cut(axis, options.batch_size)


def _along(label: _Entry, entries: Mapping[str, _Entry]) -> _Entry:
    """Cut an array of labels as the inputs are cut: a row for each of their samples."""
    rows = label.header.shape[0] if label.header.shape else 0
    for entry in entries.values():
        cut, shape = entry.cut, entry.header.shape
        if cut.axis is not None and rows == shape[cut.axis]:
            return replace(label, cut=Cut(0, cut.size))
    return label


def _batch_axis(wanted: Input, signature: Signature) -> int | None:
    """Return the axis with the symbol that the first symbolic leading axis of an input has."""
    leading = [i.shape[0] for i in signature.inputs if i.shape]
    symbols = [dim for dim in leading if not isinstance(dim, int)]
    if not symbols or wanted.shape is None or symbols[0] not in wanted.shape:
        return None
    if symbols[0] is None:  # dimensions without name: only the first can be taken for the batch
        return 0 if wanted.shape[0] is None else None
    return wanted.shape.index(symbols[0])


def _count_calls(path: Path, entries: Mapping[str, _Entry]) -> int:
    counts = {name: entry.cut.calls(entry.header.shape) for name, entry in entries.items()}
    several = {name: count for name, count in counts.items() if count is not None}
    if len(set(several.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in several.items())
        message = f"its arrays hold different numbers of calls: {printable(listed)}"
        hint = "stack as many for every input; an array of an input's own rank is for all calls"
        raise UsageError(message, where=str(path), hint=hint)
    calls = next(iter(several.values()), 1)
    if not calls:
        raise UsageError("holds no call: an array has no element", where=str(path))  # noqa: EM101
    return calls


def _unreadable(path: Path, error: BaseException) -> UsageError:
    kind = "an .npz file of plain arrays" if path.suffix.lower() == ".npz" else "a .npy array"
    message = f"cannot be read as {kind}: {str(error) or type(error).__name__}"
    hint = "np.savez writes such a file, np.save those of one array"
    return UsageError(printable(message), where=str(path), hint=hint)
