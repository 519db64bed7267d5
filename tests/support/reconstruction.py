"""What tests of passes that choose codes by their outputs have in common."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.calls import Feeds, Samples

Array = npt.NDArray[Any]


def samples_of(calls: Sequence[Feeds]) -> Samples:
    """Return calls as samples."""
    return Samples("a test", made_up=False, count=len(calls), read=lambda: iter(calls))


def decoder(layers: int = 3, width: int = 32, vocabulary: int = 60) -> tuple[str, dict[str, Array]]:
    """Return a small decoder as ONNX text, `ids` to `logits`, and its weights.

    Products are called `q0`, `k0`, `v0`, `o0`, `up0`, `down0`, and so on; `head` is the last one,
    `embed` the table.
    """
    lines = ["[embed] h0 = Gather(table, ids)"]
    random = np.random.default_rng(0)
    weights: dict[str, Array] = {"table": random.standard_normal((vocabulary, width))}
    weights["scale"] = np.array(width**-0.5)
    for at in range(layers):
        lines += [
            f"a{at} = LayerNormalization(h{at}, norm)",
            *(f"[{name}{at}] {name}_{at} = MatMul(a{at}, w{name}{at})" for name in "qkv"),
            f"t{at} = Transpose<perm = [0, 2, 1]>(k_{at})",
            f"s{at} = MatMul(q_{at}, t{at})",
            f"m{at} = Mul(s{at}, scale)",
            f"p{at} = Softmax(m{at})",
            f"c{at} = MatMul(p{at}, v_{at})",
            f"[o{at}] b{at} = MatMul(c{at}, wo{at})",
            f"r{at} = Add(h{at}, b{at})",
            f"n{at} = LayerNormalization(r{at}, norm)",
            f"[up{at}] u{at} = MatMul(n{at}, wup{at})",
            f"g{at} = Relu(u{at})",
            f"[down{at}] d{at} = MatMul(g{at}, wdown{at})",
            f"h{at + 1} = Add(r{at}, d{at})",
        ]
        shapes = dict.fromkeys(("q", "k", "v", "o"), (width, width))
        shapes |= {"up": (width, 2 * width), "down": (2 * width, width)}
        for name, shape in shapes.items():
            weights[f"w{name}{at}"] = random.standard_normal(shape) / np.sqrt(shape[0])
    lines += [f"last = LayerNormalization(h{layers}, norm)", "[head] logits = MatMul(last, whead)"]
    weights["whead"] = random.standard_normal((width, vocabulary)) / np.sqrt(width)
    weights["norm"] = np.ones(width)
    text = "g (int64[B, T] ids) => (float[B, T, V] logits) {\n" + "\n".join(lines) + "\n}"
    return text, {name: value.astype(np.float32) for name, value in weights.items()}


def token_calls(
    count: int, *, batch: int = 1, length: int = 24, vocabulary: int = 60
) -> list[Feeds]:
    """Return calls of the decoder."""
    random = np.random.default_rng(1)
    return [{"ids": random.integers(0, vocabulary, (batch, length))} for _ in range(count)]
