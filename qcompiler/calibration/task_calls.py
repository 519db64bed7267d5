"""What a model is to be good at: calls with the answers that are right."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import (
    Feeds,
    SampleOptions,
    Samples,
    call_digest,
    counted,
)
from qcompiler.calibration.samples import open_samples
from qcompiler.calibration.signature import Signature, read_signature
from qcompiler.calibration.token_inputs import IDS, MASK, fill_inputs
from qcompiler.calibration.token_text import load_tokenizer, padding_id, special_tokens
from qcompiler.errors import UsageError
from qcompiler.function_reference import import_function

IGNORED: Final = -100
"""The label of a position that does not count."""
LABELS: Final = "labels"
"""Name of the array of a call that holds its labels."""


class TaskKind(StrEnum):
    """What tells a right answer from a wrong one."""

    OUTPUTS = "outputs"
    """What the float model returns."""
    LABELS = "labels"
    """Labels: of rows, or of tokens."""
    FUNCTION = "function"
    """A function of the user's."""


@dataclass(frozen=True, slots=True)
class TaskCall:
    """One sample.

    Attributes:
        feeds: Inputs of the model.
        labels: int64, numbers of classes by row or by row and position, `IGNORED` where a position
            does not count; None where the loss needs none.
    """

    feeds: Feeds
    labels: npt.NDArray[np.int64] | None


@dataclass(frozen=True)
class Task:
    """Samples of a task, in a fixed order, one row each.

    Attributes:
        kind: What the loss compares outputs with.
        origin: What reports print: where the samples come from, and what the loss is.
        count: Number of samples.
        read: Makes a new iterator over them.
        function: For `FUNCTION`: of outputs and inputs, both by name, it returns a scalar tensor.
    """

    kind: TaskKind
    origin: str
    count: int
    read: Callable[[], Iterator[TaskCall]]
    function: Callable[..., Any] | None = None

    def samples(self) -> Samples:
        """Return the inputs alone, to calibrate on."""

        def read() -> Iterator[Feeds]:
            return (call.feeds for call in self.read())

        return Samples(self.origin, False, self.count, read)

    def first(self, count: int) -> "Task":
        """Return the task of the first samples; itself where these are all."""
        if count >= self.count:
            return self
        origin = f"the first {counted(count, 'sample')} of {self.origin}"
        return replace(self, origin=origin, count=count, read=lambda: islice(self.read(), count))

    def fingerprint(self) -> str:
        """Return a SHA-256, hex, over what the loss is and all inputs and labels in order."""
        digest = hashlib.sha256(self.kind.value.encode())
        for call in self.read():
            labels = {} if call.labels is None else {LABELS: call.labels}
            digest.update(call_digest({**call.feeds, **labels}))
        return digest.hexdigest()


def task_of_outputs(samples: Samples) -> Task:
    """Return the task of returning what the float model does."""
    return _of_rows(TaskKind.OUTPUTS, samples, f"outputs of the float model on {samples.origin}")


def open_task(
    source: str | None, model: ir.Model, options: SampleOptions, samples: Samples | None
) -> Task:
    """Open what a user names as the task.

    | source                                          | loss                                      |
    |-------------------------------------------------|-------------------------------------------|
    | .jsonl with `prompt` and `answer`               | cross entropy of the tokens of the answer |
    | .txt, or .jsonl with a text field               | cross entropy of every next token         |
    | .npz or a folder of them, with `labels` in each | cross entropy of the labels               |
    | `module:function`                               | what it returns                           |

    Args:
        source: A path or a reference. An answer that is a number is one of the line's `choices`.
            None is the task of returning what the float model does on `samples`.
        model: The model.
        options: How texts are read.
        samples: Calls for a function's loss, and where there is no source.

    Raises:
        UsageError: It cannot be read, or does not fit the model.
    """
    if source is None:
        assert samples is not None
        return task_of_outputs(samples)
    path = Path(source)
    if not path.exists() and ":" in source:
        function = import_function(source, where="--task", example="my_task:loss")
        if samples is None:
            message = "a loss function needs calls to be computed on"
            raise UsageError(message, where=f"--task {source}", hint="give --calibration DATA")
        task = _of_rows(TaskKind.FUNCTION, samples, f"{source} on {samples.origin}")
        return Task(task.kind, task.origin, task.count, task.read, function)
    if path.is_dir() or path.suffix.lower() == ".npz":
        return _labelled(path, read_signature(model), options)
    if path.suffix.lower() == ".jsonl" and _is_prompted(path):
        return _prompted(path, read_signature(model), options)
    return _texts(open_samples(source, model, options))


def _of_rows(kind: TaskKind, samples: Samples, origin: str) -> Task:
    """Return a task without labels; calls are cut into rows."""

    def read() -> Iterator[TaskCall]:
        for feeds in samples:
            for row in _rows_of(feeds):
                yield TaskCall(row, None)

    return Task(kind, origin, sum(_row_count(feeds) for feeds in samples), read)


def _texts(samples: Samples) -> Task:
    def read() -> Iterator[TaskCall]:
        for feeds in samples:
            for row in _rows_of(feeds):
                yield TaskCall(row, _next_tokens(row, first=0))

    count = sum(_row_count(feeds) for feeds in samples)
    return Task(TaskKind.LABELS, f"next tokens of {samples.origin}", count, read)


def _next_tokens(feeds: Feeds, first: int) -> npt.NDArray[np.int64]:
    """Return for each position the token that follows, from token number `first` on."""
    ids = feeds[IDS].astype(np.int64)
    counts = np.ones_like(ids) if MASK not in feeds else feeds[MASK].astype(np.int64)
    labels = np.full_like(ids, IGNORED)
    follows = counts[:, 1:] * counts[:, :-1] * (np.arange(1, ids.shape[1]) >= max(first, 1))
    labels[:, :-1] = np.where(follows != 0, ids[:, 1:], IGNORED)
    return labels


def _prompted(path: Path, signature: Signature, options: SampleOptions) -> Task:
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    before, after = special_tokens(tokenizer)
    pad = padding_id(tokenizer)

    def encoded(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def read() -> Iterator[TaskCall]:
        for prompt, answer in _prompts(path, options.max_samples):
            ending = encoded(answer) + after
            start = before + encoded(prompt)
            if options.max_tokens is not None:
                # What stands right before the answer says most about it.
                start = start[max(0, len(start) + len(ending) - options.max_tokens) :]
            feeds = signature.feeds(fill_inputs([start + ending], signature, pad), str(path))
            yield TaskCall(feeds, _next_tokens(feeds, first=len(start)))

    count = sum(1 for _ in _prompts(path, options.max_samples))
    return Task(
        TaskKind.LABELS, f"answers of {counted(count, 'prompt')} of {path.name}", count, read
    )


def _prompts(path: Path, limit: int | None) -> Iterator[tuple[str, str]]:
    """Yield prompt and answer of every line that is not blank."""
    read = 0
    for number, line in enumerate(path.open(encoding="utf-8"), 1):
        if not line.strip():
            continue
        if read == limit:
            return
        read += 1
        yield _prompt(line, f"{path}, line {number}")


def _prompt(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        message = f"is no JSON: {error}"
        raise UsageError(message, where=where) from error
    prompt, answer = (record.get(key) if isinstance(record, dict) else None for key in _KEYS)
    if isinstance(answer, int) and not isinstance(answer, bool):
        choices = record.get("choices")
        if not isinstance(choices, list) or not 0 <= answer < len(choices):
            message = f"answer {answer} is the number of none of its choices"
            raise UsageError(message, where=where)
        answer = choices[answer]
    if not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
        message = "has no texts prompt and answer"
        raise UsageError(message, where=where, hint='{"prompt": "2 + 2 =", "answer": " 4"}')
    return prompt, answer


_KEYS: Final = ("prompt", "answer")


def _is_prompted(path: Path) -> bool:
    """Whether the first line that is not blank has a prompt."""
    with path.open(encoding="utf-8", errors="replace") as file:
        line = next((line for line in file if line.strip()), "{}")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and _KEYS[0] in record


def _labelled(path: Path, signature: Signature, options: SampleOptions) -> Task:
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        message = "holds no .npz file"
        raise UsageError(message, where=str(path), hint=f"each holds the inputs and {LABELS!r}")

    def read() -> Iterator[TaskCall]:
        left = options.max_samples
        for file in files:
            for call in _labelled_rows(file, signature):
                if left == 0:
                    return
                left = None if left is None else left - 1
                yield call

    count = sum(1 for _ in read())
    return Task(TaskKind.LABELS, f"labels of {counted(count, 'row')} of {path.name}", count, read)


def _labelled_rows(file: Path, signature: Signature) -> Iterator[TaskCall]:
    try:
        with np.load(file, allow_pickle=False) as entries:
            arrays = {name: entries[name] for name in entries.files}
    except (OSError, ValueError) as error:
        message = f"cannot be read as .npz: {error}"
        raise UsageError(message, where=str(file)) from error
    labels = arrays.pop(LABELS, None)
    feeds = signature.feeds(arrays, str(file))
    rows = _row_count(feeds)
    if labels is None or labels.dtype.kind not in "iu" or labels.shape[:1] != (rows,):
        message = f"needs an integer array {LABELS!r} of {rows} rows"
        raise UsageError(message, where=str(file))
    wide = labels.astype(np.int64)
    for number, row in enumerate(_rows_of(feeds)):
        yield TaskCall(row, wide[number : number + 1])


def _rows_of(feeds: Feeds) -> Iterator[Feeds]:
    """Cut a call into its rows, since gradients are taken of one sample at a time."""
    count = _row_count(feeds)
    if count == 1:
        yield feeds
        return
    for row in range(count):
        yield {name: array[row : row + 1] for name, array in feeds.items()}


def _row_count(feeds: Mapping[str, npt.NDArray[Any]]) -> int:
    """Return the rows of a call: what all inputs have in front; 1 where they do not agree."""
    sizes = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
    return sizes.pop() if len(sizes) == 1 and 0 not in sizes else 1
