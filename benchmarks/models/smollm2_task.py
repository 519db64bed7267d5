"""Questions with answers for SmolLM2: BoolQ's, which are answered yes or no from a paragraph."""

import json
from pathlib import Path

import numpy as np

from benchmarks.models import smollm2_checkpoint as checkpoint
from benchmarks.models.boolq import Question, answered
from benchmarks.models.smollm2 import checkpoint_path
from benchmarks.runtime import ModelSource, open_session

CHOICES = (" no", " yes")
_MOST_TOKENS = 384


def write_answers(folder: Path, count: int, cache_dir: Path | None = None) -> Path:
    """Write the last `count` questions as a task file, with `tokenizer.json` beside it."""
    path = folder / "boolq.jsonl"
    rows = [
        {"prompt": prompt_of(each), "answer": int(each.answer), "choices": list(CHOICES)}
        for each in answered(cache_dir)[-count:]
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    tokenizer = checkpoint.load_tokenizer(checkpoint_path(cache_dir))
    tokenizer.save(str(folder / "tokenizer.json"))
    return path


def score_answers(
    source: ModelSource, count: int, cache_dir: Path | None = None
) -> dict[str, float]:
    """Score the first `count` questions, none of which a task file holds.

    Returns:
        `accuracy`; `margin`, the mean of log p(right answer) less that of the other one, which is
        the finer measure.
    """
    session = open_session(source)
    tokenizer = checkpoint.load_tokenizer(checkpoint_path(cache_dir))
    ends = [tokenizer.encode(choice).ids[-1] for choice in CHOICES]
    margins = []
    for each in answered(cache_dir)[:count]:
        ids = np.array([tokenizer.encode(prompt_of(each)).ids[-_MOST_TOKENS:]], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        logits = session.run(["logits"], feeds)[0][0, -1].astype(np.float64)
        no, yes = (float(logits[end]) for end in ends)
        margins.append(yes - no if each.answer else no - yes)
    return {
        "accuracy": float(np.mean([margin > 0 for margin in margins])),
        "margin": float(np.mean(margins)),
    }


def prompt_of(question: Question) -> str:
    """Return what stands before the answer."""
    return f"{question.passage}\nQuestion: {question.text}?\nAnswer:"
