"""Samples of tasks: one row each, with the labels that are right."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import SampleOptions
from qcompiler.calibration.task_calls import (
    IGNORED,
    Task,
    TaskKind,
    open_task,
    task_of_outputs,
)
from qcompiler.errors import UsageError
from tests.support.graphs import build
from tests.support.reconstruction import samples_of

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *"abcdefghij"]
CLS, SEP, PAD = 1, 2, 3
A, B, C, D, E = range(4, 9)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def _language_model() -> ir.Model:
    return build(
        "g (int64[b, s] input_ids, int64[b, s] attention_mask) => (float y)"
        "{ y = Constant<value_float=1.0>() }"
    )


def _classifier() -> ir.Model:
    return build("g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }")


def _lines(folder: Path, *records: object) -> Path:
    path = folder / "task.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def _open(path: Path, model: ir.Model, **options: Any) -> Task:
    return open_task(str(path), model, SampleOptions(**options), None)


def test_only_the_answer_counts(tokenizer: Path, tmp_path: Path) -> None:
    path = _lines(
        tmp_path,
        {"prompt": "a b c", "answer": "d e"},
        {"prompt": "a", "answer": 1, "choices": ["b", "c"]},
    )
    task = _open(path, _language_model(), tokenizer=tokenizer)
    assert (task.kind, task.count) == (TaskKind.LABELS, 2)
    first, second = task.read()
    assert first.feeds["input_ids"].tolist() == [[CLS, A, B, C, D, E, SEP]]
    assert first.labels is not None
    # What stands at a position is the token that follows it.
    assert first.labels.tolist() == [[IGNORED] * 3 + [D, E, SEP, IGNORED]]
    assert second.feeds["input_ids"].tolist() == [[CLS, A, C, SEP]]
    assert second.labels is not None
    assert second.labels.tolist() == [[IGNORED, C, SEP, IGNORED]]
    assert [feeds["input_ids"].shape[1] for feeds in task.samples()] == [7, 4]


def test_long_prompts_lose_their_beginning(tokenizer: Path, tmp_path: Path) -> None:
    path = _lines(tmp_path, {"prompt": "a b c", "answer": "d"})
    (call,) = _open(path, _language_model(), tokenizer=tokenizer, max_tokens=4).read()
    assert call.feeds["input_ids"].tolist() == [[B, C, D, SEP]]
    assert call.labels is not None
    assert call.labels.tolist() == [[IGNORED, D, SEP, IGNORED]]


def test_texts_are_one_sample_a_row_and_padding_does_not_count(
    tokenizer: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a b\nc\n", encoding="utf-8")
    task = _open(path, _language_model(), tokenizer=tokenizer, batch_size=2)
    first, second = task.read()
    assert task.count == 2
    assert first.labels is not None
    assert second.labels is not None
    assert first.labels.tolist() == [[A, B, SEP, IGNORED]]
    assert second.labels.tolist() == [[C, SEP, IGNORED, IGNORED]]


def test_labels_of_rows(tmp_path: Path) -> None:
    for number in range(2):
        np.savez(
            tmp_path / f"{number}.npz",
            x=np.full((2, 3), number, np.float32),
            labels=np.array([number, 2]),
        )
    task = _open(tmp_path, _classifier(), max_samples=3)
    assert task.count == 3
    found = [(call.feeds["x"][0, 0], call.labels.tolist()) for call in task.read()]  # type: ignore[union-attr]
    assert found == [(0, [0]), (0, [2]), (1, [1])]


def test_a_function_gets_calibration_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_task_for_tests.py").write_text("def loss(outputs, feeds): return 0\n")
    monkeypatch.chdir(tmp_path)
    samples = samples_of([{"x": np.zeros((2, 3), np.float32)}])
    task = open_task("my_task_for_tests:loss", _classifier(), SampleOptions(), samples)
    sys.modules.pop("my_task_for_tests")
    assert (task.kind, task.count) == (TaskKind.FUNCTION, 2)
    with pytest.raises(UsageError, match="needs calls"):
        open_task("my_task_for_tests:loss", _classifier(), SampleOptions(), None)


def test_the_float_model_s_outputs_are_a_task_without_labels() -> None:
    calls = [{"x": np.zeros((2, 3), np.float32)}, {"x": np.ones((1, 3), np.float32)}]
    task = task_of_outputs(samples_of(calls))
    assert (task.kind, task.count) == (TaskKind.OUTPUTS, 3)
    assert [call.labels for call in task.read()] == [None] * 3
    assert all(call.feeds["x"].shape == (1, 3) for call in task.read())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "no texts prompt and answer"),
        ({"prompt": "a", "answer": ""}, "no texts prompt and answer"),
        ({"prompt": "a", "answer": 2, "choices": ["b", "c"]}, "number of none of its choices"),
        ({"prompt": "a", "answer": 0}, "number of none of its choices"),
    ],
)
def test_faulty_lines_are_named(
    record: object, message: str, tokenizer: Path, tmp_path: Path
) -> None:
    path = _lines(tmp_path, {"prompt": "a", "answer": "b"}, record)
    with pytest.raises(UsageError, match=f"line 2.*{message}"):
        _open(path, _language_model(), tokenizer=tokenizer)


def test_labels_must_be_there_and_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros((2, 3), np.float32))
    with pytest.raises(UsageError, match="needs an integer array 'labels' of 2 rows"):
        _open(path, _classifier())
    np.savez(path, x=np.zeros((2, 3), np.float32), labels=np.zeros(3, np.int64))
    with pytest.raises(UsageError, match="of 2 rows"):
        _open(path, _classifier())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no"):
        _open(tmp_path / "empty", _classifier())


def test_the_first_samples_are_a_task() -> None:
    task = task_of_outputs(samples_of([{"x": np.eye(3, dtype=np.float32)}] * 2))
    first = task.first(4)
    assert (first.count, len(list(first.read()))) == (4, 4)
    assert first.origin == f"the first 4 samples of {task.origin}"
    assert first.fingerprint() != task.fingerprint()
    assert task.first(6) is task
