"""Inputs made up from a model's signature: enough to run it, not to judge its accuracy."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, SampleOptions, Samples, counted
from qcompiler.calibration.token_inputs import CACHE, IDS, MASK
from qcompiler.errors import UsageError

_SYMBOLIC_SIZE: Final = 4
_DEFAULT_CALLS: Final = 8
_HINT: Final = "give a file of samples"
_AXES: Final = 2
"""Of an attention mask: rows, tokens. Caches end in tokens, channels."""


def synthetic_feeds(
    model: ir.Model, *, seed: int | Sequence[int], symbolic_size: int = _SYMBOLIC_SIZE
) -> Feeds:
    """Make up one call's inputs from the model's signature.

    Floats are drawn from N(0, 1), integers are 1 (a valid token, mask and index almost
    everywhere), booleans are true. Every symbolic dimension has the same size, but for the
    attention mask of a decoder with a cache, which is as long as the cache and the new tokens. Such
    inputs show whether two graphs compute the same function; they say nothing about accuracy on
    real data.

    Raises:
        UsageError: An input has a type that nothing sensible can be made up for.
    """
    generator = np.random.default_rng(seed)
    past = _past_length(model, symbolic_size)
    return {
        str(value.name): _made_up(value, generator, symbolic_size, past)
        for value in model.graph.inputs
    }


def _past_length(model: ir.Model, size: int) -> int:
    """Return how much longer than the new tokens the attention mask is: as a cache is."""
    inputs = {value.name or "": value.shape for value in model.graph.inputs}
    ids, mask = inputs.get(IDS), inputs.get(MASK)
    caches = [s for name, s in inputs.items() if CACHE.fullmatch(name) and s and len(s) > _AXES]
    if not caches or mask is None or len(mask) != _AXES or (ids is not None and ids[1] == mask[1]):
        return 0
    behind_batch = caches[0][1:]
    extents = [dim for dim in behind_batch if isinstance(dim, int)]
    return extents[-_AXES] if len(extents) == len(behind_batch) else size


def open_random(count: int | None, model: ir.Model, options: SampleOptions) -> Samples:
    """Make up calls; each has its own numbers, the same for the same seed.

    Raises:
        UsageError: An input has a type that nothing sensible can be made up for.
    """
    calls = count or _DEFAULT_CALLS
    if options.max_samples is not None:
        calls = min(calls, options.max_samples)
    size = options.symbolic_size
    synthetic_feeds(model, seed=options.seed, symbolic_size=0)  # says now what cannot be made up

    def read() -> Iterator[Feeds]:
        for index in range(calls):
            yield synthetic_feeds(model, seed=(options.seed, index), symbolic_size=size)

    origin = f"{counted(calls, 'random call')} (seed {options.seed}, symbolic dimensions {size})"
    return Samples(origin, True, calls, read)


def _made_up(
    value: ir.Value, generator: np.random.Generator, size: int, past: int
) -> npt.NDArray[np.generic]:
    where = f"input {value.name}"
    if value.dtype is None or value.shape is None:
        message = "has no tensor type or no rank, so no input can be made up for it"
        raise UsageError(message, where=where, hint=_HINT)
    shape = tuple(dim if isinstance(dim, int) else size for dim in value.shape)
    if value.name == MASK and past and not isinstance(value.shape[1], int):
        shape = (shape[0], size + past)
    if value.dtype.is_floating_point():
        return generator.standard_normal(shape).astype(value.dtype.numpy())
    if value.dtype == ir.DataType.STRING:
        message = "is a string tensor, and no text can be made up for it"
        raise UsageError(message, where=where, hint=_HINT)
    return np.ones(shape, dtype=value.dtype.numpy())
