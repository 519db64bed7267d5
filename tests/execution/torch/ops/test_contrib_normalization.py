"""Fused normalizations and rotary positions of ONNX Runtime: its CPU kernels, and derivatives."""

from typing import Any

import numpy as np
import pytest

from qcompiler.errors import ModelError
from tests.support.graphs import random_array
from tests.support.single_nodes import has_gradients, matches_runtime, node_text
from tests.support.torch_programs import run_program


@pytest.mark.parametrize("skip", [(2, 3, 8), (1, 3, 8), (3, 8)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("outputs", ["y", "y,mean,inverse,total", "y,,,total"])
def test_skip_layer_normalization(skip: tuple[int, ...], outputs: str, *, biased: bool) -> None:
    inputs = {
        "x": random_array(2, 3, 8),
        "skip": random_array(*skip, seed=1),
        "gamma": random_array(8, seed=2),
        "beta": random_array(8, seed=3) if biased else None,
        "bias": random_array(8, seed=4) if biased else None,
    }
    op = "SkipLayerNormalization<epsilon=0.001>"
    matches_runtime(op, inputs, tolerance=2e-6, outputs=outputs)


@pytest.mark.parametrize("outputs", ["y", "y,,inverse,total", "y,,,total"])
@pytest.mark.parametrize("biased", [False, True])
def test_skip_simplified_layer_normalization(outputs: str, *, biased: bool) -> None:
    inputs = {
        "x": random_array(2, 3, 8),
        "skip": random_array(2, 3, 8, seed=1),
        "gamma": random_array(8, seed=2),
        "bias": random_array(8, seed=4) if biased else None,
    }
    op = "SkipSimplifiedLayerNormalization<epsilon=0.001>"
    matches_runtime(op, inputs, tolerance=2e-6, outputs=outputs)


@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_skip_normalizations_have_gradients_and_halves(op: str) -> None:
    inputs = {name: random_array(1, 2, 4, seed=seed) for seed, name in enumerate("xs")}
    inputs |= {"gamma": random_array(4, seed=3), "bias": random_array(4, seed=4)}
    has_gradients(op, inputs, outputs="y,,,total")
    halves = {name: each.astype(np.float16) for name, each in inputs.items()}
    matches_runtime(op, halves, tolerance=4e-3)


def test_skip_simplified_layer_normalization_refuses_a_mean() -> None:
    inputs = {"x": random_array(2, 8), "s": random_array(2, 8), "g": random_array(8)}
    text = node_text("SkipSimplifiedLayerNormalization", inputs, outputs="y,mean")
    with pytest.raises(ModelError, match="it has no mean to return"):
        run_program(text, inputs)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("outputs", ["y", "y,inverse"])
def test_simplified_layer_normalization(axis: int, outputs: str) -> None:
    shape = (8,) if axis == -1 else (3, 8)
    inputs = {"x": random_array(2, 3, 8), "g": random_array(*shape, seed=1)}
    op = f":SimplifiedLayerNormalization<axis={axis}, epsilon=0.001>"
    matches_runtime(op, inputs, tolerance=2e-6, outputs=outputs)
    has_gradients(op, inputs | {"x": inputs["x"][:1]}, outputs=outputs)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("outputs", ["y,counts", "y,counts,total"])
def test_embed_layer_normalization(outputs: str, *, placed: bool) -> None:
    tokens = np.random.default_rng(0).integers(0, 5, (2, 3)).astype(np.int32)
    inputs: dict[str, Any] = {
        "tokens": tokens,
        "segments": tokens % 2 if placed else None,
        "words": random_array(5, 8),
        "places": random_array(4, 8, seed=1),
        "table": random_array(2, 8, seed=2) if placed else None,
        "gamma": random_array(8, seed=3),
        "beta": random_array(8, seed=4),
        "mask": np.array([[1, 1, 0], [1, 0, 0]], np.int32) if placed else None,
        "ids": np.array([[2, 1, 0], [0, 0, 3]], np.int32) if placed else None,
    }
    matches_runtime("EmbedLayerNormalization", inputs, tolerance=4e-6, outputs=outputs)


ROTARY = [
    ((2, 3, 16), 4, ""),
    ((2, 3, 16), 4, "<interleaved=1>"),
    ((2, 2, 3, 8), 4, ""),
    ((2, 3, 16), 2, "<num_heads=2, rotary_embedding_dim=4>"),
    ((2, 2, 3, 8), 2, "<num_heads=2, rotary_embedding_dim=4, interleaved=1>"),
]


@pytest.mark.parametrize(("shape", "half", "attributes"), ROTARY)
@pytest.mark.parametrize("positions", [[2], [[0, 3, 1], [2, 2, 5]]])
def test_rotary_embedding(
    positions: Any, shape: tuple[int, ...], half: int, attributes: str
) -> None:
    inputs = {
        "x": random_array(*shape),
        "p": np.array(positions, np.int64),
        "c": random_array(8, half, seed=1),
        "s": random_array(8, half, seed=2),
    }
    matches_runtime(f"RotaryEmbedding{attributes}", inputs, tolerance=1e-6)
    has_gradients(f"RotaryEmbedding{attributes}", inputs)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [("scale=2.0", "scale is set"), ("rotary_embedding_dim=4", "without num_heads")],
)
def test_rotary_embedding_refuses(attributes: str, reason: str) -> None:
    inputs = {
        "x": random_array(2, 3, 16),
        "p": np.array([0], np.int64),
        "c": random_array(8, 4),
        "s": random_array(8, 4),
    }
    with pytest.raises(ModelError, match=reason):
        run_program(node_text(f"RotaryEmbedding<{attributes}>", inputs), inputs)
