"""What calibrated int8 is scored on: a workload, its calibration samples, and unseen inputs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.models import cifar_cnn, minilm, silero_vad, smollm2
from benchmarks.runtime import Feeds
from benchmarks.workloads import WORKLOADS, Workload

_IMAGES = 500
_IMAGES_A_CALL = 10
_QUESTIONS_A_CALL = 8
_QUESTION_CALLS = 25
_WINDOWS = 16
_SQNR_WINDOW = 128
_CHUNKS = 200
_CALIBRATION_VOICE = 1


@dataclass(frozen=True, slots=True)
class Int8Workload:
    """A real model, what its activations are calibrated with, and what it is scored on.

    Attributes:
        task: The model, its task and the inputs whose latency counts.
        samples: Returns the calls to calibrate with.
        samples_are: What they are, for the report.
        feeds: Returns the inputs of the output's SQNR; none is calibrated with.
        feeds_are: What they are, for the report.
        transformer: Whether peers that ask are told that it is a transformer.
    """

    task: Workload
    samples: Callable[[], Iterable[Feeds]]
    samples_are: str
    feeds: Callable[[], Sequence[Feeds]]
    feeds_are: str
    transformer: bool = False

    @property
    def name(self) -> str:
        """Its name in the catalog."""
        return self.task.name


def write_calls(folder: Path, calls: Iterable[Feeds]) -> int:
    """Write one .npz file per call, named in their order; return how many."""
    count = 0
    for count, feeds in enumerate(calls, start=1):
        np.savez(folder / f"{count:05}.npz", **feeds)  # type: ignore[arg-type]
    return count


def _cifar_samples() -> list[Feeds]:
    calls = _IMAGES // _IMAGES_A_CALL
    return cifar_cnn.image_feeds(calls, _IMAGES_A_CALL, cifar_cnn.TEST_IMAGES - _IMAGES)


def _unseen_questions() -> list[Feeds]:
    """Return questions that follow those of calibration, one a call: none is padded."""
    texts = _QUESTIONS_A_CALL * _QUESTION_CALLS
    return minilm.sample_feeds(texts + 64, batch=1)[texts:]


def _unseen_windows() -> list[Feeds]:
    before = _WINDOWS * smollm2.CONTEXT // _SQNR_WINDOW
    return smollm2.sample_feeds(before + 4, length=_SQNR_WINDOW)[before:]


def _smollm2(variant: smollm2.Variant) -> Int8Workload:
    return Int8Workload(
        WORKLOADS[f"smollm2_{variant}"],
        partial(smollm2.sample_feeds, _WINDOWS, length=smollm2.CONTEXT),
        f"{_WINDOWS} windows of {smollm2.CONTEXT} tokens of passages that are not scored",
        _unseen_windows,
        f"4 windows of {_SQNR_WINDOW} tokens after those",
        transformer=True,
    )


def _silero(variant: silero_vad.Variant) -> Int8Workload:
    name = "silero_vad" if variant == "vad" else f"silero_vad_{variant}"
    return Int8Workload(
        WORKLOADS[name],
        partial(silero_vad.sample_feeds, _CHUNKS, variant, seed=_CALIBRATION_VOICE),
        f"{_CHUNKS} chunks of another synthetic voice, each with the state it is reached in",
        WORKLOADS[name].feeds,
        "16 chunks of the scored voice",
    )


_WORKLOADS = (
    Int8Workload(
        WORKLOADS[cifar_cnn.NAME],
        _cifar_samples,
        f"the last {_IMAGES} test images in calls of {_IMAGES_A_CALL} (5 % of what a full run "
        "scores: there are no others)",
        partial(cifar_cnn.image_feeds, 10, 100),
        "the first 1,000 test images",
    ),
    Int8Workload(
        WORKLOADS[minilm.NAME],
        partial(minilm.sample_feeds, _QUESTION_CALLS, _QUESTIONS_A_CALL),
        f"{_QUESTION_CALLS * _QUESTIONS_A_CALL} BoolQ questions in padded batches of "
        f"{_QUESTIONS_A_CALL}",
        _unseen_questions,
        "the next 64 questions, one a call",
        transformer=True,
    ),
    _smollm2("folded"),
    _smollm2("raw"),
    _silero("vad"),
    _silero("op18_ifless"),
)

INT8_WORKLOADS: dict[str, Int8Workload] = {each.name: each for each in _WORKLOADS}
