"""Inputs to run a model on: opens whatever a user names as their source."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import onnx_ir as ir

from qcompiler.calibration import array_files, image_folder, token_text
from qcompiler.calibration.array_files import open_array_files
from qcompiler.calibration.calls import Feeds, SampleOptions, Samples, warnings
from qcompiler.calibration.folder_files import has_files
from qcompiler.calibration.image_folder import open_images
from qcompiler.calibration.onnx_test_data import is_test_data, open_test_data
from qcompiler.calibration.polygraphy_inputs import open_polygraphy_inputs
from qcompiler.calibration.python_source import open_function
from qcompiler.calibration.random_inputs import open_random, synthetic_feeds
from qcompiler.calibration.signature import Signature, read_signature
from qcompiler.calibration.token_text import open_texts
from qcompiler.errors import UsageError

__all__ = [
    "KINDS",
    "Feeds",
    "SampleOptions",
    "Samples",
    "load_feeds",
    "open_samples",
    "synthetic_feeds",
    "warnings",
]

_Opener = Callable[[Path, Signature, SampleOptions], Samples]

_FILES: Final[Mapping[str, _Opener]] = {
    "arrays": open_array_files,
    "images": open_images,
    "onnx": open_test_data,
    "polygraphy": open_polygraphy_inputs,
    "text": open_texts,
}
KINDS: Final = (*_FILES, "python", "random")
"""What a source may begin with, as in `images:FOLDER`, to say what it is."""

_SUFFIXES: Final = {
    "arrays": array_files.SUFFIXES,
    "images": image_folder.SUFFIXES,
    "polygraphy": frozenset({".json"}),
    "text": token_text.SUFFIXES,
}
_IN_FOLDERS: Final = ("arrays", "images")
_LABELLED: Final = ("arrays", "polygraphy", "python")
_LABEL_HINT: Final = "write inputs and labels with np.savez, or yield both from module:function"
_FUNCTION: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def open_samples(
    source: str,
    model: ir.Model,
    options: SampleOptions,
    *,
    label: str | None = None,
    needs_label: bool = False,
) -> Samples:
    """Open a source of samples.

    Args:
        source: A .npz or .npy file or a folder of them, a folder of ONNX test data, Polygraphy
            inputs (.json), texts (.txt, .jsonl), an image or a folder of images,
            `module:function`, `random` or `random:N`; with one of `KINDS` and a colon before it
            where it is not clear what it is.
        model: The model that the samples are for.
        options: How they are read.
        label: An array of integers that calls may hold beside the inputs, a row for each sample.
        needs_label: Whether they must.

    Raises:
        UsageError: It is not clear what the source is, it cannot be read, or does not fit the
            model. Damage that shows late is raised on reading.
    """
    for name in ("max_samples", "batch_size", "sequence_length", "max_tokens", "max_bytes"):
        number = getattr(options, name)
        if number is not None and number < 1:
            message = f"is {number}, and must be at least 1"
            raise UsageError(message, where=name)
    try:
        kind, place = _recognize(source)
        if needs_label and kind not in _LABELLED:
            message = f"samples from {kind} have no labels"
            raise UsageError(message, where=source, hint=_LABEL_HINT)
        if kind == "random":
            return open_random(_count(place), model, options)
        signature = read_signature(model)
        if label is not None:
            signature = signature.with_label(label, optional=not needs_label)
        if kind == "python":
            return open_function(place, signature, options)
        return _FILES[kind](_existing(place), signature, options)
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise UsageError(message, where=source, hint=_known_sources()) from error


def load_feeds(path: Path, model: ir.Model) -> Feeds:
    """Read the first call's inputs from an .npz file (see `array_files`).

    Raises:
        UsageError: Not an .npz file, holds pickled objects, or does not fit the model's inputs.
    """
    samples = open_array_files(path, read_signature(model), SampleOptions(max_samples=1))
    return next(iter(samples))


def _recognize(source: str) -> tuple[str, str]:
    """Return the kind of a source, and the source without it."""
    if source == "random":
        return "random", ""
    kind, separator, place = source.partition(":")
    if separator and kind in KINDS:
        return kind, place
    path = Path(source)
    if path.is_dir():
        return _recognize_folder(path), source
    if not path.exists() and _FUNCTION.fullmatch(source):
        return "python", source
    for kind, suffixes in _SUFFIXES.items():
        if path.suffix.lower() in suffixes:
            return kind, source
    problem = "its name does not say what it is" if path.exists() else "there is no such file"
    raise UsageError(problem, where=source, hint=_known_sources())


def _recognize_folder(folder: Path) -> str:
    if is_test_data(folder):
        return "onnx"
    found = [
        kind
        for kind in _IN_FOLDERS
        if has_files(folder, _SUFFIXES[kind], recursive=kind == "images")
    ]
    if len(found) == 1:
        return found[0]
    message = f"holds both {' and '.join(found)}" if found else "holds nothing that can be read"
    hint = " or ".join(f"{kind}:{folder}" for kind in found) or _known_sources()
    raise UsageError(message, where=str(folder), hint=hint)


def _existing(place: str) -> Path:
    path = Path(place)
    if not path.exists():
        message = "there is no such file or folder"
        raise UsageError(message, where=place, hint=_known_sources())
    return path


def _count(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or not int(text):
        message = f"{text!r} is no number of calls"
        raise UsageError(message, where=f"random:{text}", hint="random:16, or python:MODULE:NAME")
    return int(text)


def _known_sources() -> str:
    return (
        "a source is a .npz, .npy, .json (Polygraphy), .txt or .jsonl file, a folder of arrays, "
        "images or ONNX test data, module:function, or random; KIND: before it says what it is, "
        f"with KIND one of {', '.join(KINDS)}"
    )
