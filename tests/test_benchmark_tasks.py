"""Scores of questions with choices, from a session that is made up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from benchmarks.models import smollm2_task
from benchmarks.models.smollm2_task import Question, score_task
from benchmarks.runtime import Array
from benchmarks.torch_session import Output


@dataclass(frozen=True)
class _Encoding:
    ids: list[int]


class _Letters:
    """A tokenizer with a token for each letter."""

    def encode(self, text: str) -> _Encoding:
        return _Encoding([ord(letter) for letter in text])


class _Session:
    """A model that expects `b` next, by as much as twice, wherever it is; padding upsets it."""

    def get_outputs(self) -> Sequence[Output]:
        return [Output("logits")]

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        assert names == ["logits"]
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        assert ((ids != 0) == (mask == 1)).all()
        logits = np.where(mask[:, :, None] == 1, 0.0, np.nan) * np.ones(128)
        logits[:, :, ord("b")] += np.log(2)
        return [logits.astype(np.float32)]


def test_scores_are_of_the_tokens_of_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        Question("q", ("b", "cc"), 0),
        Question("qq", ("bb", "c"), 1),
        Question("q", ("c",), 0),
    ]
    monkeypatch.setattr(smollm2_task, "_tokenizer", lambda _: _Letters())
    monkeypatch.setattr(smollm2_task, "questions", lambda *_: asked)
    found = score_task(_Session(), "siqa", 2)
    assert found["accuracy"] == 0.5
    # A letter c has probability 1 / 129, a letter b twice that: however many there are.
    assert found["margin"] == pytest.approx(0, abs=1e-6)
    assert found["loss"] == pytest.approx(np.log(129) - np.log(2) / 2, abs=1e-5)
