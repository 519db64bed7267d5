"""Calls to run a model on: what every source of samples makes."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.input_statistics import InputMoments, InputStatistics, is_float_input

Feeds = dict[str, npt.NDArray[Any]]
"""One call's inputs: input name to array, in the order of the model's inputs."""

DEFAULT_MAX_BYTES: Final = 2 << 30


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """How a source is read. What does not concern a source is ignored by it.

    Attributes:
        max_samples: Samples read at most: images, windows of tokens, texts, rows where a batch of
            a file is split, else calls. None reads all.
        batch_size: Samples in a call. None is the model's own batch where that is a number, else
            1; arrays in files then come as they are stored.
        max_bytes: Largest size of one call, and of one file entry that must be read whole.
        seed: Of random inputs.
        symbolic_size: Size of symbolic dimensions of random inputs.
        tokenizer: A Hugging Face `tokenizer.json`, for texts.
        sequence_length: Tokens in a window that texts are packed to. None gives every text its
            own row, as long as it is.
        max_tokens: Tokens of a text at most, where texts are not packed. None takes the limit
            that the tokenizer file sets, if any.
        text_field: Name of the field of .jsonl lines that holds the text.
        image_spec: How images are preprocessed: a TOML file or `size=224,mean=...` (see
            `image_spec.parse_image_spec`).
    """

    max_samples: int | None = None
    batch_size: int | None = None
    max_bytes: int = DEFAULT_MAX_BYTES
    seed: int = 0
    symbolic_size: int = 4
    tokenizer: Path | None = None
    sequence_length: int | None = None
    max_tokens: int | None = None
    text_field: str = "text"
    image_spec: str | None = None


@dataclass(frozen=True)
class Samples:
    """Calls to run a model on, in a fixed order, one in memory at a time.

    Iterate as often as needed: every iteration reads the source again.

    Attributes:
        origin: What reports print: where the calls come from, and how many of what there is.
        made_up: Whether the data is random, so that accuracy measured on it means nothing.
        count: Number of calls.
        read: Makes a new iterator over the calls.
    """

    origin: str
    made_up: bool
    count: int
    read: Callable[[], Iterator[Feeds]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Feeds]:
        return self.read()

    def fingerprint(self) -> str:
        """Return a SHA-256, hex, over names, types, shapes and bytes of every call in order.

        The first time this or `warnings` is asked for, the data is read once for both.
        """
        return self._survey[0]

    def input_statistics(self) -> dict[str, InputStatistics]:
        """Return what the values of float inputs look like, by name; read with the above."""
        return self._survey[2]

    @cached_property
    def _survey(self) -> tuple[str, tuple[str, ...], dict[str, InputStatistics]]:
        digest = hashlib.sha256()
        inputs: dict[str, _Seen] = {}
        for feeds in self:
            digest.update(call_digest(feeds))
            for name, array in feeds.items():
                if is_float_input(array):
                    inputs.setdefault(name, _Seen()).add(array)
        found = (seen.warning(name, self.count) for name, seen in inputs.items())
        statistics = {name: seen.moments.statistics() for name, seen in inputs.items()}
        return (
            digest.hexdigest(),
            tuple(text for text in found if text),
            {name: entry for name, entry in statistics.items() if entry is not None},
        )


def warnings(samples: Samples) -> tuple[str, ...]:
    """Say which float inputs cannot calibrate anything: never varying, or holding NaN.

    Integer inputs such as masks may well be constant, and so may scalars such as a sampling rate.
    """
    return samples._survey[1]


def call_digest(feeds: Feeds) -> bytes:
    """Return the SHA-256 over names, types, shapes and bytes of one call."""
    digest = hashlib.sha256()
    for name, array in feeds.items():
        texts = array.dtype.kind == "U"  # as wide as the longest text of its file: not hashed
        form = json.dumps([name, array.ravel().tolist() if texts else array.dtype.name])
        digest.update(f"{len(form)} {form} {array.shape}".encode())
        if not texts and array.size:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def counted(number: int, noun: str) -> str:
    """Return `1 call`, `2 calls`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class _Seen:
    """What one float input held so far."""

    def __init__(self) -> None:
        self._first: Any = None
        self._varies = False
        self._size = 0
        self._calls_with_nan = 0
        self.moments = InputMoments()

    def add(self, array: npt.NDArray[Any]) -> None:
        self.moments.add(array)
        self._size = max(self._size, array.size)
        if not array.size:
            return
        if np.isnan(array).any():
            self._calls_with_nan += 1
        if self._first is None:
            self._first = array.reshape(-1)[0]
        self._varies = self._varies or bool((array != self._first).any())

    def warning(self, name: str, calls: int) -> str | None:
        if self._calls_with_nan:
            return f"input {name} holds NaN in {self._calls_with_nan} of {counted(calls, 'call')}"
        if self._size > 1 and not self._varies:
            return (
                f"input {name} is {float(self._first):g} everywhere in {counted(calls, 'call')}: "
                "no range can be calibrated on it"
            )
        return None
