"""Inputs to run a model on: from an .npz file, or made up from the model's signature."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import UsageError

Feeds = dict[str, npt.NDArray[Any]]
"""One call's inputs: input name to array."""

_SYMBOLIC_SIZE = 4


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
        UsageError: Not an .npz file, holds pickled objects, or its names or types do not match.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        message = f"cannot be read as an .npz file of plain arrays: {error}"
        raise UsageError(message, where=str(path)) from error
    return _matched(arrays, model, str(path))


def _matched(arrays: Mapping[str, npt.NDArray[Any]], model: ir.Model, where: str) -> Feeds:
    wanted = {str(v.name): v for v in model.graph.inputs}
    if set(arrays) < set(wanted):
        message = f"holds {sorted(arrays)}, and the model's inputs are {sorted(wanted)}"
        raise UsageError(message, where=where)
    feeds: Feeds = {}
    for name, value in wanted.items():
        expected = value.dtype.numpy() if value.dtype is not None else None
        if name not in arrays or (expected is not None and arrays[name].dtype != expected):
            found = arrays[name].dtype if name in arrays else "nothing"
            message = f"holds {found} for input {name}, which takes {expected}"
            raise UsageError(message, where=where)
        feeds[name] = arrays[name]
    return feeds
