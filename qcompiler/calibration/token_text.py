"""Samples from texts and a tokenizer: lines of a .txt file, or a field of .jsonl lines."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.calls import Feeds, SampleOptions, Samples, counted
from qcompiler.calibration.signature import Signature
from qcompiler.calibration.token_inputs import fill_inputs, read_layout
from qcompiler.errors import UsageError

SUFFIXES = frozenset({".txt", ".jsonl"})
_PAD_TOKENS: Final = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")
_LINES_AT_ONCE: Final = 256

_Row = Sequence[int] | npt.NDArray[np.int32]
"""Token ids."""


def open_texts(path: Path, signature: Signature, options: SampleOptions) -> Samples:
    """Open a file of texts for a model that takes `input_ids`.

    With a `sequence_length` the texts follow each other, line ends included, in windows of exactly
    that many tokens; what is left at the end is dropped. Each window has the special tokens that
    the tokenizer puts around a text. Without, each text is a row with its own length.

    Packing tokenizes at once, and keeps the ids (4 bytes each); else texts are read again and
    again, `batch_size` at a time.

    Raises:
        UsageError: The `tokenizers` package is missing, a file cannot be read, the texts are too
            few, or the model takes inputs that texts cannot fill.
    """
    layout = read_layout(signature)
    tokenizer = load_tokenizer(options.tokenizer)
    pad_id = padding_id(tokenizer)
    fixed = layout.batch if isinstance(layout.batch, int) else None
    batch = options.batch_size or fixed or 1
    if fixed not in (None, batch):
        message = f"the model takes batches of {fixed}, not of {batch}"
        raise UsageError(message, where="batch_size")
    if options.sequence_length is None:
        count, rows = _texts(path, tokenizer, options)
        unit = "texts"
    else:
        if isinstance(layout.length, int) and layout.length != options.sequence_length:
            message = f"the model takes {layout.length} tokens, not {options.sequence_length}"
            raise UsageError(message, where="sequence_length")
        windows = _windows(path, tokenizer, options.sequence_length, options)
        count, rows = len(windows), lambda: iter(windows)
        unit = f"windows of {options.sequence_length} tokens"
    calls = count // batch if fixed else -(-count // batch)
    if not calls:
        raise _too_few(path, unit, count, batch)

    def read() -> Iterator[Feeds]:
        source = rows()
        for _ in range(calls):
            call = list(itertools.islice(source, batch))
            yield signature.feeds(fill_inputs(call, signature, pad_id), str(path))

    origin = f"{counted(calls, 'call')} from {path.name} ({min(count, calls * batch)} {unit})"
    return Samples(origin, False, calls, read)


def _too_few(path: Path, unit: str, count: int, batch: int) -> UsageError:
    message = f"holds {count} {unit}, and a call takes {batch}"
    return UsageError(message, where=str(path), hint="give more text, or a smaller sequence_length")


def load_tokenizer(path: Path | None) -> Any:
    """Return the `tokenizers.Tokenizer` of a file.

    Raises:
        UsageError: There is no file, it is no tokenizer, or the package is missing.
    """
    if path is None:
        message = "texts need a tokenizer"
        raise UsageError(message, where="text", hint="--tokenizer tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        message = "texts need the package tokenizers, which is not installed"
        hint = 'pip install "qcompiler[text]"'
        raise UsageError(message, where=str(path), hint=hint) from error
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises plain Exception
        message = f"cannot be read as a tokenizer: {error}"
        hint = "give the tokenizer.json that the model was published with"
        raise UsageError(message, where=str(path), hint=hint) from error


def padding_id(tokenizer: Any) -> int:
    """Return the padding token's id; padding is masked out, so that any token would do."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    known = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
    return next((int(token) for token in known if token is not None), 0)


def _texts(
    path: Path, tokenizer: Any, options: SampleOptions
) -> tuple[int, Callable[[], Iterator[_Row]]]:
    tokenizer.no_padding()
    if options.max_tokens is not None:
        tokenizer.enable_truncation(options.max_tokens)
    count = sum(1 for _ in itertools.islice(_read_texts(path, options), options.max_samples))

    def rows() -> Iterator[_Row]:
        for text in itertools.islice(_read_texts(path, options), count):
            yield tokenizer.encode(text).ids

    return count, rows


def _windows(path: Path, tokenizer: Any, length: int, options: SampleOptions) -> list[_Row]:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    before, after = special_tokens(tokenizer)
    content = length - len(before) - len(after)
    if content < 1:
        message = f"{length} leaves no place beside {len(before) + len(after)} special tokens"
        raise UsageError(message, where="sequence_length", hint="make it larger")
    windows: list[_Row] = []
    left: list[int] = []
    texts = (f"{text}\n" for text in _read_texts(path, options))
    while chunk := list(itertools.islice(texts, _LINES_AT_ONCE)):
        for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False):
            left.extend(encoding.ids)
        whole = len(left) // content
        for start in range(0, whole * content, content):
            window = [*before, *left[start : start + content], *after]
            windows.append(np.array(window, np.int32))
            if len(windows) == options.max_samples:
                return windows
        left = left[whole * content :]
    return windows


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text."""
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    outer = tokenizer.encode("a").ids
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return outer[:start], outer[start + len(inner) :]
    return [], []


def _read_texts(path: Path, options: SampleOptions) -> Iterator[str]:
    """Yield the texts that are not blank, without their line ends."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if path.suffix.lower() == ".jsonl":
                    line = _text_field(line, options.text_field, f"{path}, line {number}")
                text = line.rstrip("\r\n")
                if text.strip():
                    yield text
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot be read as UTF-8 text: {error}"
        raise UsageError(message, where=str(path)) from error


def _text_field(line: str, field: str, where: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        message = f"is no JSON: {error}"
        raise UsageError(message, where=where) from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        names = ", ".join(sorted(record)[:12]) if isinstance(record, dict) else "no map"
        message = f"has no text field {field!r}; it holds {names}"
        raise UsageError(message, where=where, hint="text_field names the field")
    return text
