"""The measures of a task that are built in, and those that a user's function gives.

Every measure is a ratio of two sums over samples, or a function of one, so that two models can be
compared sample by sample.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.calls import Feeds
from qcompiler.calibration.estimates import Estimate, Sums, difference, exponential, ratio, share
from qcompiler.calibration.metric import Run, find_metric, users_metric
from qcompiler.calibration.quality import log_softmax
from qcompiler.errors import UsageError
from qcompiler.function_reference import import_function

Outputs = Mapping[str, npt.NDArray[Any]]

_TOP: Final = re.compile(r"top-?(\d+)")
_ROWS_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model scored on some samples.

    Attributes:
        numerators: Of the ratio, one a sample.
        denominators: Of the ratio, one a sample.
    """

    numerators: Sums
    denominators: Sums


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """A measure of a model.

    Attributes:
        name: As the user writes it.
        higher_is_better: Whether more is better.
        unit: What it is in, for people.
        label: Name of the labels that calls must hold, None where it needs none.
        shares: Whether the ratio is a share of samples.
        exponent: Whether the measure is e to the ratio.
        of_call: Scores the outputs of one call; None where `of_run` does it.
        of_run: Scores whatever runs a model; None where `of_call` does it.
    """

    name: str
    higher_is_better: bool
    unit: str
    label: str | None = None
    shares: bool = False
    exponent: bool = False
    of_call: Callable[[Feeds, Outputs], Scores] | None = None
    of_run: Callable[[Run], Scores] | None = None

    def estimate(self, scores: Scores) -> Estimate:
        """Return the measure of one model."""
        if self.shares:
            return share(scores.numerators, scores.denominators)
        found = ratio(scores.numerators, scores.denominators)
        return exponential(found) if self.exponent else found

    def worsening(self, base: Scores, other: Scores) -> Estimate:
        """Return by how much another model is worse than the base, in the measure's unit.

        Raises:
            UsageError: A user's function did not score the same samples of both.
        """
        sizes = (len(base.numerators), len(other.numerators))
        if sizes[0] != sizes[1] or not np.array_equal(base.denominators, other.denominators):
            message = f"scored {sizes[0]} samples of one model and {sizes[1]} of the other"
            hint = "the function must score the same samples of every model"
            raise UsageError(message, where=f"metric {self.name}", hint=hint)
        found = difference(base.numerators, other.numerators, base.denominators, shares=self.shares)
        if self.exponent:
            level = float(np.exp(base.numerators.sum() / base.denominators.sum()))
            found = found.mapped(lambda x: level * (float(np.exp(x)) - 1))
        return found.mapped(lambda x: 0.0 - x) if self.higher_is_better else found


def find_task_metric(text: str, label: str) -> TaskMetric:
    """Return the measure of a name.

    Args:
        text: `top1`, `top5`, ...; `perplexity`; `f1:`, `exact-match:`, `wer:` or `cer:` and the
            `module:function` that predicts; or a `module:function` that measures.
        label: What labels are called in the data.

    Raises:
        UsageError: There is no such measure or function.
    """
    top = _TOP.fullmatch(text)
    if top is not None and int(top[1]) > 0:
        rank = int(top[1])
        return TaskMetric(text, True, "share", label, True, of_call=_Top(rank, label))
    if text == "perplexity":
        return TaskMetric(text, False, "perplexity", exponent=True, of_call=_token_losses)
    name, colon, reference = text.partition(":")
    if name in _ON_TEXTS and colon:
        score, better, shares = _ON_TEXTS[name]
        example = "my_eval:predictions"
        predict = import_function(reference, where=f"metric {name}", example=example)
        run = _OnTexts(predict, score, reference)
        return TaskMetric(text, better, "share", shares=shares, of_run=run)
    if not colon:
        message = f"there is no metric {text!r}"
        known = ("top1", "top5", "perplexity", *(f"{n}:module:function" for n in _ON_TEXTS))
        hint = f"there are {', '.join(known)} and module:function"
        raise UsageError(message, where="metric", hint=hint)
    return TaskMetric(text, True, "", of_run=_OfUser(find_metric(text).scores))


@dataclass(frozen=True, slots=True)
class _OfUser:
    """A user's own measure."""

    scores: Callable[[Run], npt.NDArray[np.float64]]

    def __call__(self, run: Run) -> Scores:
        found = self.scores(run)
        return Scores(found, np.ones_like(found))


@dataclass(frozen=True, slots=True)
class _Top:
    """Whether the label is among the largest entries of an output's last axis."""

    rank: int
    label: str

    def __call__(self, feeds: Feeds, outputs: Outputs) -> Scores:
        labels = feeds[self.label]
        scores = _fitting(labels, outputs, self.label)
        rows = labels.reshape(len(labels), -1) if labels.ndim else labels.reshape(1, 1)
        wide = scores.reshape(*rows.shape, scores.shape[-1]).astype(np.float64)
        inside = (rows >= 0) & (rows < wide.shape[-1])
        own = np.take_along_axis(wide, np.where(inside, rows, 0)[..., None], axis=-1)
        # Of equal entries the first counts as the largest, as with argmax.
        before = np.arange(wide.shape[-1]) < rows[..., None]
        place = (wide > own).sum(axis=-1) + ((wide == own) & before).sum(axis=-1)
        hits = (inside & (place < self.rank) & ~np.isnan(own[..., 0])).sum(axis=1)
        return Scores(hits.astype(np.float64), np.full(len(rows), float(rows.shape[1])))


def _fitting(labels: npt.NDArray[Any], outputs: Outputs, name: str) -> npt.NDArray[Any]:
    """Return the first output that has a row of classes for each label."""
    shape = labels.shape[:-1] if labels.ndim > 1 and labels.shape[-1] == 1 else labels.shape
    for values in outputs.values():
        if values.dtype.kind not in "iub" and values.ndim and values.shape[:-1] == shape:
            return values
    found = ", ".join(f"{each} {list(values.shape)}" for each, values in outputs.items())
    message = f"no output has a row of classes for each of {name} {list(labels.shape)}: {found}"
    raise UsageError(message, where="metric", hint="module:function can measure anything")


def _token_losses(feeds: Feeds, outputs: Outputs) -> Scores:
    """Return the losses of the next tokens of each text, and their number."""
    ids = feeds.get("input_ids")
    fitting = (v for v in outputs.values() if ids is not None and v.shape[:-1] == ids.shape)
    logits = next(fitting, None)
    if ids is None or logits is None or ids.ndim != 2:
        message = "perplexity takes input_ids [batch, tokens] and logits [batch, tokens, words]"
        raise UsageError(message, where="metric", hint="module:function can measure anything")
    mask = feeds.get("attention_mask", np.ones_like(ids))[:, -ids.shape[1] :]
    counts = (mask[:, 1:] * mask[:, :-1]).astype(np.float64)
    losses = np.zeros(len(ids))
    for index, (tokens, rows) in enumerate(zip(ids, logits, strict=True)):
        for start in range(0, len(tokens) - 1, _ROWS_AT_ONCE):
            part = slice(start, min(start + _ROWS_AT_ONCE, len(tokens) - 1))
            logs = log_softmax(rows[part].astype(np.float64))
            picked = logs[np.arange(len(logs)), tokens[part.start + 1 : part.stop + 1]]
            losses[index] -= float((picked * counts[index, part]).sum())
    return Scores(losses, counts.sum(axis=1))


TextScore = Callable[[str, Sequence[str]], tuple[float, float]]
"""Scores a prediction by what would be right: numerator and denominator."""


@dataclass(frozen=True, slots=True)
class _OnTexts:
    """Scores pairs of a predicted text and the right one, or several right ones."""

    predict: Callable[[Run], Any]
    score: TextScore
    reference: str

    def __call__(self, run: Run) -> Scores:
        with users_metric(self.reference):
            pairs = [(str(one), _answers(right)) for one, right in self.predict(run)]
        if not pairs or not all(right for _, right in pairs):
            message = "returned no pairs of a prediction and what would be right"
            raise UsageError(message, where=f"metric {self.reference}")
        sums = np.array([self.score(one, right) for one, right in pairs], dtype=np.float64)
        return Scores(sums[:, 0], sums[:, 1])


def _answers(right: object) -> list[str]:
    if isinstance(right, str):
        return [right]
    if isinstance(right, Sequence):
        return [str(each) for each in right]
    message = f"{right!r} is no text, and no list of texts"
    raise TypeError(message)


_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


def _normal(text: str) -> list[str]:
    """Return the words of an answer as SQuAD compares them (Rajpurkar et al., 2016)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(prediction: str, right: Sequence[str]) -> tuple[float, float]:
    """Whether a prediction is one of the answers, but for case, punctuation and articles."""
    return float(any(_normal(prediction) == _normal(answer) for answer in right)), 1.0


def token_f1(prediction: str, right: Sequence[str]) -> tuple[float, float]:
    """Return the F1 of words shared with the best of the answers."""
    return max(_f1(_normal(prediction), _normal(answer)) for answer in right), 1.0


def _f1(found: list[str], right: list[str]) -> float:
    if not found or not right:
        return float(found == right)
    left = list(right)
    for word in found:
        if word in left:
            left.remove(word)
    same = len(right) - len(left)
    return 2 * same / (len(found) + len(right))


def word_errors(prediction: str, right: Sequence[str]) -> tuple[float, float]:
    """Return the edits to the nearest answer, and its words."""
    return _errors(prediction.split(), [answer.split() for answer in right])


def character_errors(prediction: str, right: Sequence[str]) -> tuple[float, float]:
    """Return the edits to the nearest answer, and its characters."""
    return _errors(list(prediction), [list(answer) for answer in right])


def _errors(found: list[str], right: Sequence[list[str]]) -> tuple[float, float]:
    # The denominator must not depend on the model, so it is not that of the nearest answer.
    answer = max(right, key=len)
    return min(float(edits(found, each)) for each in right), float(len(answer))


def edits(found: Sequence[str], right: Sequence[str]) -> int:
    """Return the fewest insertions, deletions and substitutions (Levenshtein, 1966)."""
    row = list(range(len(right) + 1))
    for index, one in enumerate(found, start=1):
        above, row[0] = row[0], index
        for column, other in enumerate(right, start=1):
            cost = min(row[column] + 1, row[column - 1] + 1, above + (one != other))
            above, row[column] = row[column], cost
    return row[-1]


_ON_TEXTS: Final[Mapping[str, tuple[TextScore, bool, bool]]] = {
    "f1": (token_f1, True, False),
    "exact-match": (exact_match, True, True),
    "wer": (word_errors, False, False),
    "cer": (character_errors, False, False),
}
"""Score, whether more is better, and whether it is a share of samples."""
