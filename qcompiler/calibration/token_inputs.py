"""Filling the inputs of a language model: token ids, masks, positions and empty caches."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.calls import Feeds
from qcompiler.calibration.signature import Dimension, Input, Signature
from qcompiler.errors import UsageError

IDS: Final = "input_ids"
MASK: Final = "attention_mask"
CACHE: Final = re.compile(r"past(_key_values?|_kv)?[._]?\d*([._].*)?")
"""Names of inputs that hold what a decoder has computed of earlier tokens."""
_RANKS: Final = {
    IDS: (2,),
    MASK: (2,),
    "token_type_ids": (2,),
    "position_ids": (2, 1),
    "cache_position": (1,),
    "use_cache_branch": (1,),
}
"""Number of dimensions with which an input of this name has the meaning assumed here."""


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """What the signature of a language model fixes.

    Attributes:
        batch: Rows of a call: a number, the name of the symbolic size, or None.
        length: Tokens in a row, in the same way.
    """

    batch: Dimension
    length: Dimension


def read_layout(signature: Signature) -> TokenLayout:
    """Check that every required input is one that can be filled from texts.

    Raises:
        UsageError: There is no `input_ids`, another input is unknown or has a shape that does not
            go with its name, or a cache cannot be empty.
    """
    unknown = [str(i) for i in signature.required if not _is_known(i)]
    ids = next((i for i in signature.required if i.name == IDS), None)
    if unknown or ids is None or ids.shape is None:
        message = (
            f"texts fill inputs called {', '.join(_RANKS)} and past_key_values.*, "
            f"and the model also takes {', '.join(unknown)}"
            if unknown
            else f"texts fill an input called {IDS}, and the model takes {signature}"
        )
        hint = "write the inputs with np.savez, or give them with module:function"
        raise UsageError(message, where="text", hint=hint)
    layout = TokenLayout(ids.shape[0], ids.shape[1])
    for cache in (i for i in signature.required if CACHE.fullmatch(i.name)):
        if 0 not in _cache_shape(cache, layout, 1):
            message = "has no symbolic length, so it cannot be empty at the start of a text"
            hint = "write the inputs with np.savez, or export the model with a symbolic past"
            raise UsageError(message, where=f"input {cache}", hint=hint)
    return layout


def _is_known(wanted: Input) -> bool:
    if wanted.shape is None:
        return False
    if CACHE.fullmatch(wanted.name):
        return len(wanted.shape) >= 3
    return len(wanted.shape) in _RANKS.get(wanted.name, ())


def fill_inputs(
    rows: Sequence[Sequence[int] | npt.NDArray[Any]], signature: Signature, pad_id: int
) -> Feeds:
    """Make the inputs of one call.

    Args:
        rows: Token ids of every row. Shorter rows are padded at the end, and masked there; to the
            length that the model fixes, or to the longest.
        signature: Inputs that `read_layout` accepted.
        pad_id: Token that rows are padded with.

    Returns:
        Ids and mask [rows, length], positions [rows, length] or [length], caches with a past of
        length 0; each in the type of its input. Optional inputs are left out but for those known.

    Raises:
        UsageError: Rows must be padded, and the model takes no mask, or they are too long.
    """
    layout = read_layout(signature)
    lengths = np.array([len(row) for row in rows])
    length = layout.length if isinstance(layout.length, int) else int(lengths.max())
    _check_lengths(lengths, length, signature)
    mask = np.arange(length)[None] < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.concatenate([np.asarray(row, np.int64) for row in rows])
    known: dict[str, npt.NDArray[Any]] = {
        IDS: ids,
        MASK: mask,
        "token_type_ids": np.zeros_like(ids),
        "cache_position": np.arange(length),
        "use_cache_branch": np.zeros(1, np.bool_),
    }
    feeds = {}
    for wanted in signature.inputs:
        if not _is_known(wanted) or wanted.shape is None:
            continue  # optional: read_layout refuses others
        if CACHE.fullmatch(wanted.name):
            array: npt.NDArray[Any] = np.zeros(_cache_shape(wanted, layout, len(rows)))
        elif wanted.name == "position_ids":
            positions = np.arange(length)
            array = np.tile(positions, (len(rows), 1)) if len(wanted.shape) > 1 else positions
        else:
            array = known[wanted.name]
        if not wanted.optional or wanted.name in known:
            feeds[wanted.name] = array.astype(wanted.dtype.numpy())
    return feeds


def _check_lengths(lengths: npt.NDArray[Any], length: int, signature: Signature) -> None:
    if (lengths > length).any():
        message = f"a text has {lengths.max()} tokens, and the model takes {length}"
        raise UsageError(message, where="text", hint="max_tokens cuts texts off")
    if (lengths < length).any() and not any(i.name == MASK for i in signature.inputs):
        short = int(lengths.min())
        message = f"rows of {short} and {length} tokens need an {MASK}, and the model takes none"
        hint = "pack the texts with sequence_length, or take one text a call"
        raise UsageError(message, where="text", hint=hint)


def _cache_shape(cache: Input, layout: TokenLayout, rows: int) -> tuple[int, ...]:
    """Return the shape of an empty cache: what is symbolic and not the batch is 0."""
    assert cache.shape is not None
    # Without a name, the batch is where [batch, heads, past, channels] has it.
    nameless = max(0, len(cache.shape) - 4)
    sizes = []
    for axis, dim in enumerate(cache.shape):
        if isinstance(dim, int):
            sizes.append(dim)
        elif dim is not None and dim == layout.batch:
            sizes.append(rows)
        else:
            is_batch = axis == nameless and layout.batch not in cache.shape
            sizes.append(rows if is_batch else 0)
    return tuple(sizes)
