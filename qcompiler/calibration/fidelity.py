"""How near the outputs of one model are to those of another, sample by sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.estimates import (
    Estimate,
    Sums,
    decibels_of,
    difference,
    ratio,
    share,
)
from qcompiler.calibration.quality import is_float, row_divergences
from qcompiler.execution.differences import Meaning

_CHUNK_BYTES: Final = 16 << 20
"""Of values as float64 that are compared at once."""
_SIGNAL, _NOISE, _COSINE, _KL, _SAME, _ROWS = range(6)


@dataclass(slots=True)
class OutputFidelity:
    """Sums of one output over the samples, in the order in which they came.

    Attributes:
        name: The output.
        meaning: What its last axis holds, None where that is no distribution.
    """

    name: str
    meaning: Meaning | None
    _sums: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, truth: npt.NDArray[Any], found: npt.NDArray[Any], samples: int) -> None:
        """Add one call's output of both models, which holds so many samples on its first axis.

        An output without such an axis is one sample.
        """
        split = truth.ndim > 0 and truth.shape[0] == samples
        if truth.shape != found.shape:
            lost = np.zeros((6, samples if split else 1))
            lost[[_SIGNAL, _ROWS]], lost[_NOISE], lost[_KL] = 1.0, np.inf, np.inf
            self._sums.append(lost)
            return
        count = truth.shape[0] if split else 1
        flat = [each.reshape(count, -1) for each in (truth, found)]
        step = max(1, _CHUNK_BYTES // (8 * max(1, flat[0].shape[1])))
        width = truth.shape[-1] if truth.ndim > 1 else 1
        for start in range(0, count, step):
            parts = [each[start : start + step].astype(np.float64) for each in flat]
            self._sums.append(self._compare(parts[0], parts[1], width))

    def _compare(
        self, truth: npt.NDArray[np.float64], found: npt.NDArray[np.float64], width: int
    ) -> npt.NDArray[np.float64]:
        sums = np.zeros((6, len(truth)))
        with np.errstate(invalid="ignore", over="ignore"):
            distance = np.where(_same(truth, found), 0.0, found - truth)
        sums[_SIGNAL] = _finite((truth**2).sum(axis=1))
        sums[_NOISE] = _finite((distance**2).sum(axis=1))
        sums[_COSINE] = _cosine(truth, found)
        if truth.shape[1] and width > 1:
            rows = [each.reshape(len(truth), -1, width) for each in (truth, found)]
            sums[_ROWS] = rows[0].shape[1]
            sums[_SAME] = (rows[0].argmax(axis=-1) == rows[1].argmax(axis=-1)).sum(axis=1)
            meaning = self.meaning or Meaning.LOGITS
            with np.errstate(invalid="ignore", over="ignore"):
                sums[_KL] = _finite(row_divergences(rows[0], rows[1], meaning).sum(axis=1))
        return sums

    @property
    def is_distribution(self) -> bool:
        """Whether its rows are known to be distributions."""
        return self.meaning is not None

    def sqnr(self) -> Estimate:
        """Return the signal to noise ratio over all samples, dB."""
        return decibels_of(self._column(_SIGNAL), self._column(_NOISE))

    def cosine(self) -> Estimate:
        """Return the mean cosine of the angle between samples."""
        cosines = self._column(_COSINE)
        return ratio(cosines, np.ones_like(cosines))

    def divergence(self) -> Estimate:
        """Return the mean Kullback-Leibler divergence of rows, nats."""
        found = ratio(self._column(_KL), self._column(_ROWS))
        return found if found.low is None else replace(found, low=max(0.0, found.low))

    def agreement(self) -> Estimate:
        """Return the share of rows whose largest entry is the same."""
        return share(self._column(_SAME), self._column(_ROWS))

    def worsening(self, figure: str, then: "OutputFidelity") -> Estimate:
        """Return by how much a figure is worse than another model's on the same samples.

        Args:
            figure: "sqnr", "cosine", "kl" or "agreement".
            then: The same output of the other model.
        """
        if figure == "sqnr":
            return _lost_decibels(then._column(_NOISE), self._column(_NOISE))
        index, sign = {"cosine": (_COSINE, -1), "kl": (_KL, 1), "agreement": (_SAME, -1)}[figure]
        rows = self._column(_ROWS) if figure != "cosine" else np.ones_like(self._column(_ROWS))
        shares = figure == "agreement"
        both = then._column(index), self._column(index)
        return difference(both[0] * sign, both[1] * sign, rows, shares=shares)

    def _column(self, index: int) -> Sums:
        return np.concatenate([sums[index] for sums in self._sums])


class Fidelity:
    """The fidelity of all float outputs of a model.

    Args:
        meanings: What outputs hold, by name.
    """

    def __init__(self, meanings: Mapping[str, Meaning | None]) -> None:
        self._meanings = meanings
        self.outputs: dict[str, OutputFidelity] = {}

    def add(
        self,
        truth: Mapping[str, npt.NDArray[Any]],
        found: Mapping[str, npt.NDArray[Any]],
        samples: int,
    ) -> None:
        """Add the outputs of one call, which holds so many samples."""
        for name, values in truth.items():
            if is_float(values):
                entry = self.outputs.setdefault(
                    name, OutputFidelity(name, self._meanings.get(name))
                )
                entry.add(values, found[name], samples)


def _lost_decibels(then: Sums, now: Sums) -> Estimate:
    """Return how many dB of signal to noise ratio are lost from one noise to another."""
    totals = float(then.sum()), float(now.sum())
    if totals[0] == totals[1]:
        return Estimate(0.0, samples=len(now))
    if 0.0 in totals or not np.isfinite(totals).all():
        return Estimate(float("inf") if totals[1] > totals[0] else float("-inf"), samples=len(now))
    found = decibels_of(then, now)
    return found.mapped(lambda decibels: 0.0 - decibels)


def _cosine(truth: npt.NDArray[np.float64], found: npt.NDArray[np.float64]) -> Sums:
    with np.errstate(invalid="ignore", over="ignore"):
        product = (truth * found).sum(axis=1)
        lengths = np.sqrt((truth**2).sum(axis=1) * (found**2).sum(axis=1))
        same = _same(truth, found).all(axis=1)
        cosines = np.divide(product, lengths, out=np.zeros_like(product), where=lengths > 0)
    return np.where(same, 1.0, np.where(np.isfinite(cosines), cosines, 0.0))


def _same(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    return np.asarray((one == other) | (np.isnan(one) & np.isnan(other)))


def _finite(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.inf)
