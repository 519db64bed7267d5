"""Inputs to run a model on: from an .npz file, or made up from the model's signature."""

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import UsageError

Feeds = dict[str, npt.NDArray[Any]]
"""One call's inputs: input name to array."""

_SYMBOLIC_SIZE = 4
_UNREADABLE = (
    *(OSError, EOFError, TypeError, ValueError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What NumPy and zipfile raise on files that are damaged or something else."""


def synthetic_feeds(model: ir.Model, *, seed: int) -> Feeds:
    """Make up one call's inputs from the model's signature.

    Floats are drawn from N(0, 1), integers are 1 (a valid token, mask and index almost
    everywhere), booleans are true. A symbolic dimension is 4, each name once. Such inputs show
    whether two graphs compute the same function; they say nothing about accuracy on real data.

    Raises:
        UsageError: An input has a type that nothing sensible can be made up for.
    """
    generator = np.random.default_rng(seed)
    return {str(v.name): _made_up(v, generator) for v in model.graph.inputs}


def _made_up(value: ir.Value, generator: np.random.Generator) -> npt.NDArray[Any]:
    if value.dtype is None or value.shape is None:
        message = "has no tensor type or no rank, so no input can be made up for it"
        raise UsageError(message, where=f"input {value.name}", hint="pass --samples FILE.npz")
    shape = tuple(dim if isinstance(dim, int) else _SYMBOLIC_SIZE for dim in value.shape)
    if value.dtype.is_floating_point():
        return generator.standard_normal(shape).astype(value.dtype.numpy())
    if value.dtype == ir.DataType.STRING:
        message = "is a string tensor, and no text can be made up for it"
        raise UsageError(message, where=f"input {value.name}", hint="pass --samples FILE.npz")
    return np.ones(shape, dtype=value.dtype.numpy())


def load_feeds(path: Path, model: ir.Model) -> Feeds:
    """Read one call's inputs from an .npz file whose keys are the model's input names.

    Raises:
        UsageError: Not an .npz file, holds pickled objects, names an input the model does not
            have or lacks one it has, or an array has another type than its input.
    """
    try:
        arrays = _read(path)
    except _UNREADABLE as error:
        message = f"cannot be read as an .npz file of plain arrays: {error}"
        raise UsageError(message, where=str(path), hint="np.savez writes such a file") from error
    return _matched(arrays, model, str(path))


def _read(path: Path) -> Feeds:
    with path.open("rb") as file:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            message = "it holds one array without a name"
            raise TypeError(message)
        return {name: np.asarray(found[name]) for name in found.files}


def _matched(arrays: Mapping[str, npt.NDArray[Any]], model: ir.Model, where: str) -> Feeds:
    wanted = {str(v.name): v for v in model.graph.inputs}
    if set(arrays) != set(wanted):
        message = f"holds {_listed(arrays)}, and the model's inputs are {_listed(wanted)}"
        parts = (
            ("missing", wanted.keys() - arrays.keys()),
            ("not in the model", arrays.keys() - wanted.keys()),
        )
        hint = "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names)
        raise UsageError(message, where=where, hint=hint)
    for name, value in wanted.items():
        if value.dtype is not None and not _holds(arrays[name], value.dtype):
            expected = value.dtype.numpy()
            message = f"holds {arrays[name].dtype} for input {name}, which takes {value.dtype}"
            raise UsageError(
                message, where=where, hint=f"convert it with .astype({str(expected)!r})"
            )
    return {name: arrays[name] for name in wanted}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _holds(array: npt.NDArray[Any], dtype: ir.DataType) -> bool:
    if dtype == ir.DataType.STRING:
        return array.dtype.kind == "U"  # an .npz holds texts of Python type only as a pickle
    return bool(array.dtype == dtype.numpy())
