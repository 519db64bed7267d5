from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.calibration.task_metrics import (
    Scores,
    TaskMetric,
    character_errors,
    edits,
    exact_match,
    find_task_metric,
    token_f1,
    word_errors,
)
from qcompiler.errors import UsageError
from tests.support.graphs import random_array


def _of_call(metric: TaskMetric, feeds: Mapping[str, Any], outputs: Mapping[str, Any]) -> Scores:
    assert metric.of_call is not None
    return metric.of_call(dict(feeds), outputs)


def test_top_k_is_argmax_of_equal_entries_too() -> None:
    logits = np.array([[1, 2, 2], [2, 2, 2], [0, 1, 3], [np.nan, 1, 2]], np.float32)
    labels = np.array([1, 2, 7, 0])
    outputs = {"ids": np.arange(4), "logits": logits}
    top1 = _of_call(find_task_metric("top1", "label"), {"label": labels}, outputs)
    assert top1.numerators.tolist() == [1, 0, 0, 0]
    top3 = _of_call(find_task_metric("top-3", "label"), {"label": labels}, outputs)
    assert top3.numerators.tolist() == [1, 1, 0, 0]
    random = random_array(50, 10)
    found = _of_call(find_task_metric("top1", "l"), {"l": random.argmax(1)[:, None]}, {"y": random})
    assert found.numerators.sum() == 50


def test_top_k_needs_an_output_that_fits() -> None:
    metric = find_task_metric("top1", "label")
    with pytest.raises(UsageError, match="no output has a row of classes"):
        _of_call(metric, {"label": np.zeros(3, int)}, {"y": random_array(4, 10)})


def test_perplexity_is_that_of_unmasked_next_tokens() -> None:
    ids = np.array([[1, 2, 0, 3], [2, 1, 1, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    logits = random_array(2, 4, 5)
    metric = find_task_metric("perplexity", "label")
    scores = _of_call(metric, {"input_ids": ids, "attention_mask": mask}, {"logits": logits})
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = [-logs[0, t, ids[0, t + 1]] for t in range(3)]
    losses += [-logs[1, t, ids[1, t + 1]] for t in range(2)]
    assert metric.estimate(scores).value == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert not metric.higher_is_better
    worse = Scores(scores.numerators + 0.1 * scores.denominators, scores.denominators)
    expected = np.exp(np.mean(losses)) * (np.exp(0.1) - 1)
    assert metric.worsening(scores, worse).value == pytest.approx(expected, rel=1e-5)


def test_text_scores() -> None:
    assert exact_match("The cat!", ["a cat"]) == (1.0, 1.0)
    assert exact_match("cats", ["cat", "dog"]) == (0.0, 1.0)
    assert token_f1("the black cat", ["cat", "dog"])[0] == pytest.approx(2 / 3)
    assert token_f1("", [""]) == (1.0, 1.0)
    assert word_errors("a b c d", ["a x c"]) == (2.0, 3.0)
    assert character_errors("abc", ["abcd", "xyz"]) == (1.0, 4.0)
    assert edits("kitten", "sitting") == 3
    assert edits("", "abc") == 3


@pytest.fixture
def my_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gate_eval.py").write_text(
        "import numpy as np\n"
        "def pairs(run):\n    return [('a b', 'a b'), ('a', ['b', 'c d'])]\n"
        "def nothing(run):\n    return []\n"
        "def each(run):\n    return [0.5, 1.0]\n"
        "def one(run):\n    return 0.75\n"
        "def wrong(run):\n    return float('nan')\n"
        "def fails(run):\n    raise ValueError('oops')\n"
    )
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("my_eval")
def test_functions_of_a_user() -> None:
    def run(_: Any) -> dict[str, Any]:
        return {}

    def value(text: str) -> float:
        metric = find_task_metric(text, "label")
        assert metric.of_run is not None
        return metric.estimate(metric.of_run(run)).value

    assert value("exact-match:gate_eval:pairs") == 0.5
    assert value("wer:gate_eval:pairs") == pytest.approx(2 / 4) or value(
        "wer:gate_eval:pairs"
    ) == pytest.approx(1 / 4)
    assert value("gate_eval:each") == 0.75
    assert value("gate_eval:one") == 0.75
    for text, reason in {
        "f1:gate_eval:nothing": "no pairs",
        "gate_eval:wrong": "a finite number",
        "gate_eval:fails": "failed with ValueError: oops",
    }.items():
        with pytest.raises(UsageError, match=reason):
            value(text)


def test_scores_of_other_samples_are_refused() -> None:
    metric = find_task_metric("top1", "label")
    with pytest.raises(UsageError, match="scored 2 samples of one model and 3"):
        metric.worsening(Scores(np.ones(2), np.ones(2)), Scores(np.ones(3), np.ones(3)))


@pytest.mark.parametrize("text", ["top0", "accuracy", "f1"])
def test_unknown_metrics(text: str) -> None:
    with pytest.raises(UsageError, match="there is no metric"):
        find_task_metric(text, "label")
