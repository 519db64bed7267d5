"""Samples from Polygraphy's input files (`--save-inputs`): a JSON list of name -> array.

An array is written as `{"array": BASE64 OF .npy DATA, "polygraphy_class": "ndarray"}`. Older
versions marked it with `"__polygraphy_encoded_ndarray": "polygraphy_serialized_json_type"`, and
still older ones wrote the data as latin-1 text. Read in NVIDIA/TensorRT,
tools/Polygraphy/polygraphy/json/serde.py and polygraphy/constants.py.
"""

import base64
import binascii
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from qcompiler.calibration.calls import Feeds, SampleOptions, Samples, counted
from qcompiler.calibration.npy_stream import UNREADABLE, decode_npy
from qcompiler.calibration.signature import Signature
from qcompiler.errors import UsageError, printable

_CLASS: Final = "polygraphy_class"
_OLD_CLASS: Final = "__polygraphy_encoded_ndarray"
_WRAPPERS: Final = ("LazyArray", "LazyNumpyArray")
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
_HINT: Final = "polygraphy run --save-inputs writes such a file"

_Span = tuple[int, int]


def open_polygraphy_inputs(path: Path, signature: Signature, options: SampleOptions) -> Samples:
    """Open a Polygraphy input file; each element of its list is one call.

    Only where the elements lie is found here; iterating decodes one at a time.

    Raises:
        UsageError: It cannot be read as such a file, holds pickled data, or does not fit.
    """
    try:
        spans = _element_spans(path)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    kept = spans[: options.max_samples]
    if not kept:
        raise _unreadable(path, ValueError("its list is empty"))
    longest = max(stop - start for start, stop in kept)
    if longest > options.max_bytes:
        message = f"a call takes {longest} bytes, more than the limit of {options.max_bytes}"
        raise UsageError(message, where=str(path))

    def read() -> Iterator[Feeds]:
        with path.open("rb") as file:
            for index, (start, stop) in enumerate(kept):
                file.seek(start)
                try:
                    arrays = _decode_call(file.read(stop - start))
                except (*UNREADABLE, RecursionError, binascii.Error) as error:
                    raise _unreadable(path, error, index) from error
                yield signature.feeds(arrays, f"{path}, element {index}")

    origin = f"{counted(len(kept), 'call')} from {path.name}"
    if len(kept) < len(spans):
        origin += f" (of {len(spans)})"
    return Samples(origin, False, len(kept), read)


def _element_spans(path: Path) -> list[_Span]:
    """Return where the elements of the outermost list lie, as byte offsets."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = _scan(data)
    # Raised out here: what an exception holds on to would keep the mapping from being closed.
    if found is None:
        message = "it is no JSON list, or its list does not end"
        raise ValueError(message)
    return found


def _scan(data: mmap.mmap) -> list[_Span] | None:
    tokens = _TOKEN.finditer(data)
    opening = next(tokens, None)
    if opening is None or data[opening.start()] not in b"[" or data[: opening.start()].strip():
        return None
    spans: list[_Span] = []
    depth, start = 1, opening.end()
    for token in tokens:
        # Looked at where it lies, not as group(): a string may be nearly the whole file.
        mark = data[token.start()]
        depth += (mark in b"[{") - (mark in b"]}")
        if depth == 0 or (depth == 1 and mark in b","):
            spans.append((start, token.start()))
            start = token.end()
        if depth == 0:
            is_empty = len(spans) == 1 and not data[slice(*spans[0])].strip()
            return [] if is_empty else spans
    return None


def _decode_call(text: bytes) -> dict[str, npt.NDArray[Any]]:
    call = json.loads(text)
    if not isinstance(call, dict) or _CLASS in call:
        message = "it is no map of input names to arrays"
        raise TypeError(message)
    return {name: _decode_array(name, encoded) for name, encoded in call.items()}


def _decode_array(name: str, encoded: object) -> npt.NDArray[Any]:
    if isinstance(encoded, dict) and encoded.get(_CLASS) in _WRAPPERS:
        encoded = encoded.get("values")
    if not isinstance(encoded, dict) or not isinstance(encoded.get("array"), str):
        message = f"{name} is no encoded array"
        raise TypeError(message)
    kind = "ndarray" if _OLD_CLASS in encoded else encoded.get(_CLASS)
    if kind != "ndarray":
        message = f"{name} is a {kind}, and only NumPy arrays are read (others are pickled)"
        raise TypeError(message)
    text = encoded["array"]
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:  # latin-1 text of older versions
        data = text.encode("latin-1")
    return decode_npy(data)


def _unreadable(path: Path, error: BaseException, index: int | None = None) -> UsageError:
    place = "" if index is None else f"element {index}: "
    reason = str(error) or type(error).__name__
    message = f"cannot be read as Polygraphy inputs: {place}{reason}"
    return UsageError(printable(message), where=str(path), hint=_HINT)
