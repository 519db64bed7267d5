"""What the real models are scored on: task, feeds for SQNR, and inputs whose latency counts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.models import cifar_cnn, minilm, silero_vad, smollm2
from benchmarks.runtime import Feeds, ModelSource

_SMOLLM2_HEAD = "node_linear_210"
"""The tied output layer; the exporter numbers the products, and 210 are in the blocks."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A real model and what is measured on it.

    Attributes:
        name: Its name in the catalog.
        build: Returns its path; the first call makes it.
        evaluate: Scores a model on the first `n` items of the task.
        quick: Items of a quick run.
        full: Items of a full run.
        metric: The score to print.
        feeds: Returns the inputs of the output's SQNR; none of them is scored by the task.
        latency: Inputs to time, by name.
        same_nodes_exclude: Patterns of MatMuls that ONNX Runtime's own quantizer leaves alone;
            None where it finds nothing to quantize.
    """

    name: str
    build: Callable[[], Path]
    evaluate: Callable[[ModelSource, int], dict[str, float]]
    quick: int
    full: int
    metric: str
    feeds: Callable[[], Sequence[Feeds]]
    latency: Mapping[str, Callable[[], Feeds]]
    same_nodes_exclude: tuple[str, ...] | None = None


def _smollm2(variant: smollm2.Variant) -> Workload:
    return Workload(
        name=f"smollm2_{variant}",
        build=lambda: smollm2.build(variant),
        evaluate=smollm2.evaluate,
        quick=smollm2.QUICK_WINDOWS,
        full=smollm2.FULL_WINDOWS,
        metric="perplexity",
        feeds=lambda: smollm2.sample_feeds(2),
        latency={
            f"{length} tokens": partial(_only, smollm2.sample_feeds, 1, length=length)
            for length in (1, 64, smollm2.CONTEXT)
        },
        same_nodes_exclude=(_SMOLLM2_HEAD,),
    )


def _silero(variant: silero_vad.Variant) -> Workload:
    def evaluate(source: ModelSource, steps: int) -> dict[str, float]:
        return silero_vad.evaluate(source, steps, reference=silero_vad.build(variant))

    return Workload(
        name="silero_vad" if variant == "vad" else f"silero_vad_{variant}",
        build=lambda: silero_vad.build(variant),
        evaluate=evaluate,
        quick=200,
        full=silero_vad.STEPS,
        metric="agreement",
        feeds=lambda: silero_vad.sample_feeds(16, variant),
        latency={"1 chunk": partial(_only, silero_vad.sample_feeds, 1, variant=variant)},
    )


def _only(make: Callable[..., list[Feeds]], n: int, **arguments: object) -> Feeds:
    return make(n, **arguments)[0]


def _sentences(batch: int) -> Feeds:
    """Return a batch of sentences of 16 tokens each, so that the batch alone differs."""
    feeds = minilm.sample_feeds(1, batch)[0]
    length = 16
    return {
        name: np.ascontiguousarray(np.resize(values[:, :length], (batch, length)))
        for name, values in feeds.items()
    }


_WORKLOADS = (
    _smollm2("raw"),
    _smollm2("folded"),
    Workload(
        name=minilm.NAME,
        build=minilm.build,
        evaluate=minilm.evaluate,
        quick=200,
        full=minilm.UTTERANCES,
        metric="nearest_neighbour",
        feeds=lambda: minilm.sample_feeds(4),
        latency={f"batch {batch}": partial(_sentences, batch) for batch in (1, 64)},
        same_nodes_exclude=(),
    ),
    Workload(
        name=cifar_cnn.NAME,
        build=cifar_cnn.build,
        evaluate=cifar_cnn.evaluate,
        quick=1000,
        full=cifar_cnn.TEST_IMAGES,
        metric="top1",
        feeds=lambda: cifar_cnn.sample_feeds(8),
        latency={
            f"batch {batch}": partial(_only, cifar_cnn.sample_feeds, 1, batch=batch)
            for batch in (1, 64)
        },
    ),
    _silero("vad"),
    _silero("op18_ifless"),
)

WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _WORKLOADS}
