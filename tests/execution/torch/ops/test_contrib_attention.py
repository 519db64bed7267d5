"""Attention of every kind in ONNX Runtime: its CPU kernels, and numeric derivatives."""

from typing import Any

import numpy as np
import pytest

from qcompiler.errors import ModelError
from tests.support.graphs import Array, build, random_array
from tests.support.parity import run_model
from tests.support.single_nodes import has_gradients, matches_runtime, node_text
from tests.support.torch_programs import run_program

TOLERANCE = 5e-6


def whole(*values: Any) -> Array:
    """Return int32 numbers."""
    return np.array(values, np.int32)


def separate(batch: int, length: int, total: int, seed: int = 0) -> dict[str, Any]:
    """Return queries, keys and values of 2 heads of 4 elements, then absent inputs."""
    return {
        "q": random_array(batch, length, 8, seed=seed),
        "k": random_array(batch, total, 8, seed=seed + 1),
        "v": random_array(batch, total, 8, seed=seed + 2),
        "bias": None,
        "mask": None,
        "ab": None,
        "pk": None,
        "pv": None,
    }


def some_kept(*shape: int) -> Array:
    """Return a random mask that keeps the first key.

    Of a query that sees no key at all, float32 loses the scores beside the -10000.
    """
    mask = np.random.default_rng(0).integers(0, 2, shape).astype(np.int32)
    mask[..., 0] = 1
    return mask


MASKS: dict[str, Array | None] = {
    "none": None,
    "ends": whole(3, 5),
    "keys": whole([1, 1, 0, 1, 1], [0, 1, 1, 1, 0]),
    "pairs": None,
}
ATTRIBUTES = ["", ", unidirectional=1", ", scale=0.3, mask_filter_value=-3.0"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("attributes", ATTRIBUTES)
@pytest.mark.parametrize("biased", [False, True])
def test_multi_head_attention(mask: str, attributes: str, *, biased: bool) -> None:
    length = 5 if "unidirectional" in attributes else 3
    pairs = MASKS[mask] if mask != "pairs" else some_kept(2, length, 5)
    inputs = separate(2, length, 5) | {"mask": pairs}
    if biased:
        inputs |= {"bias": random_array(24), "ab": random_array(1, 2, length, 5, seed=7)}
    matches_runtime(f"MultiHeadAttention<num_heads=2{attributes}>", inputs, tolerance=TOLERANCE)


@pytest.mark.parametrize("attributes", ATTRIBUTES)
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_multi_head_attention_with_a_past(length: int, attributes: str, *, masked: bool) -> None:
    inputs = separate(2, length, length)
    inputs |= {"pk": random_array(2, 2, 4, 4, seed=5), "pv": random_array(2, 2, 4, 4, seed=6)}
    if masked:
        inputs["mask"] = some_kept(2, length + 4)
    op = f"MultiHeadAttention<num_heads=2{attributes}>"
    matches_runtime(op, inputs, tolerance=TOLERANCE, outputs="y,key,value")


def test_multi_head_attention_of_values_of_another_size() -> None:
    inputs = separate(2, 3, 5) | {"v": random_array(2, 5, 6), "bias": random_array(22)}
    matches_runtime("MultiHeadAttention<num_heads=2>", inputs, tolerance=TOLERANCE)


def test_multi_head_attention_over_packed_values() -> None:
    pairs = {"q": random_array(2, 5, 8), "kv": random_array(2, 5, 2, 2, 4, seed=1)}
    op = "MultiHeadAttention<num_heads=2>"
    alone = pairs["q"].reshape(2, 5, 2, 1, 4)
    # ONNX Runtime's CPU kernel takes neither form.
    packed = {"qkv": np.concatenate([alone, pairs["kv"]], 3)}
    split = {
        "q": pairs["q"],
        "k": pairs["kv"][:, :, :, 0].reshape(2, 5, 8),
        "v": pairs["kv"][:, :, :, 1].reshape(2, 5, 8),
    }
    expected = run_model(build(node_text(op, split)), split)["y"]
    for form in (pairs, packed):
        found = run_program(node_text(op, form), form)["y"]
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("biased", [False, True])
def test_multi_head_attention_over_a_cache(*, biased: bool) -> None:
    inputs = separate(2, 3, 5) | {
        "k": random_array(2, 2, 5, 4, seed=1),
        "v": random_array(2, 2, 5, 4, seed=2),
        "bias": random_array(24) if biased else None,
    }
    matches_runtime("MultiHeadAttention<num_heads=2>", inputs, tolerance=TOLERANCE)


@pytest.mark.parametrize("attributes", ["", ", unidirectional=1"])
def test_multi_head_attention_gradients(attributes: str) -> None:
    inputs = separate(1, 2, 2) | {
        "bias": random_array(24),
        "mask": whole([1, 1, 0]),
        "ab": random_array(1, 2, 2, 3),
        "pk": random_array(1, 2, 1, 4, seed=5),
        "pv": random_array(1, 2, 1, 4, seed=6),
    }
    op = f"MultiHeadAttention<num_heads=2{attributes}>"
    has_gradients(op, inputs, outputs="y,key,value")


def test_multi_head_attention_refuses_to_look_back_over_keys_of_others() -> None:
    inputs = {name: each for name, each in separate(2, 3, 5).items() if each is not None}
    text = node_text("MultiHeadAttention<num_heads=2, unidirectional=1>", inputs)
    with pytest.raises(ModelError, match="unidirectional with 3 queries for 5 new keys"):
        run_program(text, inputs)


@pytest.mark.parametrize(
    ("change", "outputs", "reason"),
    [
        ({"mask": whole(*range(8))}, "y", "a mask of shape \\[8\\]"),
        ({}, "y,,,qk", "the output of scores"),
        ({"k": None, "v": None}, "y", "lacks keys and values"),
    ],
)
def test_multi_head_attention_refuses(change: dict[str, Any], outputs: str, reason: str) -> None:
    inputs = separate(2, 3, 5) | change
    text = node_text("MultiHeadAttention<num_heads=2>", inputs, outputs=outputs)
    with pytest.raises(ModelError, match=reason):
        run_program(text, {name: each for name, each in inputs.items() if each is not None})


def merged(batch: int, length: int, **more: Any) -> dict[str, Any]:
    """Return an input of 6 elements, merged projections for 2 heads of 4, then absent inputs."""
    return {
        "x": random_array(batch, length, 6),
        "w": random_array(6, 24, seed=1),
        "b": random_array(24, seed=2),
        "mask": None,
        "past": None,
        "ab": None,
    } | more


@pytest.mark.parametrize(
    "mask",
    [
        None,
        whole(2, 3),
        whole(2, 3, 1, 0),
        whole([1, 0, 1], [1, 1, 0]),
        some_kept(2, 3, 3),
    ],
)
@pytest.mark.parametrize("attributes", ATTRIBUTES)
@pytest.mark.parametrize("biased", [False, True])
def test_attention(mask: Array | None, attributes: str, *, biased: bool) -> None:
    inputs = merged(2, 3, mask=mask)
    inputs |= {"ab": random_array(2, 1, 3, 3, seed=4)} if biased else {"b": None}
    matches_runtime(f"Attention<num_heads=2{attributes}>", inputs, tolerance=TOLERANCE)


@pytest.mark.parametrize("attributes", ATTRIBUTES)
@pytest.mark.parametrize("length", [1, 3])
def test_attention_with_a_past(length: int, attributes: str) -> None:
    mask = some_kept(2, length + 4)
    inputs = merged(2, length, mask=mask, past=random_array(2, 2, 2, 4, 4, seed=5))
    op = f"Attention<num_heads=2{attributes}>"
    matches_runtime(op, inputs, tolerance=TOLERANCE, outputs="y,present")


def test_attention_with_values_of_another_size() -> None:
    inputs = merged(2, 3, w=random_array(6, 22), b=random_array(22))
    op = "Attention<num_heads=2, qkv_hidden_sizes=[8, 8, 6]>"
    matches_runtime(op, inputs, tolerance=TOLERANCE)


def test_attention_gradients() -> None:
    inputs = merged(1, 2, past=random_array(2, 1, 2, 1, 4, seed=5))
    has_gradients("Attention<num_heads=2, unidirectional=1>", inputs, outputs="y,present")


@pytest.mark.parametrize("attribute", ["do_rotary=1", "past_present_share_buffer=1"])
def test_attention_refuses(attribute: str) -> None:
    inputs = merged(2, 3)
    text = node_text(f"Attention<num_heads=2, {attribute}>", inputs)
    with pytest.raises(ModelError, match="do_rotary and past_present_share_buffer"):
        run_program(text, {name: each for name, each in inputs.items() if each is not None})


@pytest.mark.parametrize("attributes", ["", ", unidirectional=1"])
@pytest.mark.parametrize("columns", [(), (24,)])
def test_qattention(columns: tuple[int, ...], attributes: str) -> None:
    generator = np.random.default_rng(0)
    inputs = {
        "x": generator.integers(0, 256, (2, 3, 6)).astype(np.uint8),
        "w": generator.integers(-64, 64, (6, 24)).astype(np.int8),
        "b": random_array(24),
        "xs": np.array(0.02, np.float32),
        "ws": generator.uniform(0.01, 0.03, columns).astype(np.float32),
        "mask": whole(2, 3),
        "xz": np.array(5, np.uint8),
        "wz": np.full(columns, 3, np.int8),
        "past": random_array(2, 2, 2, 4, 4, seed=5),
    }
    op = f"QAttention<num_heads=2{attributes}>"
    matches_runtime(op, inputs, tolerance=TOLERANCE, outputs="y,present")


def grouped(
    batch: int, length: int, past: int, room: int | None = None, **more: Any
) -> dict[str, Any]:
    """Return a GroupQueryAttention's inputs: 4 query heads and 2 key heads of 16 elements.

    Args:
        batch: Sequences.
        length: New tokens of each.
        past: Tokens of each before them.
        room: Tokens that the cache holds, if more than the past ones.
        more: Inputs to change.
    """
    total = past + length
    cache = (batch, 2, past if room is None else room, 16)
    return {
        "q": random_array(batch, length, 64),
        "k": random_array(batch, length, 32, seed=1),
        "v": random_array(batch, length, 32, seed=2),
        "pk": random_array(*cache, seed=3),
        "pv": random_array(*cache, seed=4),
        "lengths": np.full(batch, total - 1, np.int32),
        "total": whole(total).reshape(()),
        "cos": random_array(32, 8, seed=5),
        "sin": random_array(32, 8, seed=6),
        "ids": None,
        "ab": None,
        "sink": None,
    } | more


GROUPED = [
    "",
    ", do_rotary=1",
    ", do_rotary=1, rotary_interleaved=1, scale=0.2",
    ", local_window_size=3",
    ", softcap=1.5",
    ", smooth_softmax=1",
    ", softcap=1.5, local_window_size=2, do_rotary=1, smooth_softmax=1",
]
STEPS = [(2, 5, 0), (1, 3, 4), (1, 1, 6), (2, 1, 6)]
OP = "GroupQueryAttention<num_heads=4, kv_num_heads=2"


@pytest.mark.parametrize("attributes", GROUPED)
@pytest.mark.parametrize("step", STEPS)
def test_group_query_attention(step: tuple[int, int, int], attributes: str) -> None:
    inputs = grouped(*step)
    matches_runtime(f"{OP}{attributes}>", inputs, tolerance=TOLERANCE, outputs="y,key,value")


@pytest.mark.parametrize("attributes", ["", ", do_rotary=1"])
@pytest.mark.parametrize("step", STEPS)
def test_group_query_attention_of_packed_values(
    step: tuple[int, int, int], attributes: str
) -> None:
    packed = random_array(step[0], step[1], 128)
    inputs = grouped(*step, q=packed, k=None, v=None)
    matches_runtime(f"{OP}{attributes}>", inputs, tolerance=TOLERANCE, outputs="y,key,value")


def test_group_query_attention_without_a_cache() -> None:
    inputs = grouped(2, 5, 0, pk=None, pv=None)
    matches_runtime(f"{OP}, do_rotary=1>", inputs, tolerance=TOLERANCE, outputs="y,key,value")


@pytest.mark.parametrize("attributes", ["", ", local_window_size=2", ", softcap=2.0"])
@pytest.mark.parametrize("step", STEPS)
def test_group_query_attention_with_a_bias(step: tuple[int, int, int], attributes: str) -> None:
    total = step[1] + step[2]
    inputs = grouped(*step, ab=random_array(1, 4, step[1], total, seed=7))
    matches_runtime(f"{OP}{attributes}>", inputs, tolerance=TOLERANCE, outputs="y,key,value")


@pytest.mark.parametrize("step", STEPS)
def test_group_query_attention_with_sinks(step: tuple[int, int, int]) -> None:
    inputs = grouped(*step, sink=random_array(4, seed=8))
    matches_runtime(f"{OP}>", inputs, tolerance=TOLERANCE, outputs="y,key,value")


@pytest.mark.parametrize("step", [(2, 5, 0), (1, 3, 4)])
def test_group_query_attention_that_sees_all(step: tuple[int, int, int]) -> None:
    inputs = grouped(*step)
    matches_runtime(f"{OP}, causal=0>", inputs, tolerance=TOLERANCE, outputs="y,key,value")


@pytest.mark.parametrize("step", [(1, 3, 4), (2, 1, 6)])
def test_group_query_attention_at_given_positions(step: tuple[int, int, int]) -> None:
    ids = np.arange(step[0] * step[1]).reshape(step[:2]) + 3
    inputs = grouped(*step, ids=ids)
    matches_runtime(f"{OP}, do_rotary=1>", inputs, tolerance=TOLERANCE, outputs="y,key,value")


def valid_rows_agree(attributes: str, inputs: dict[str, Any], first: int) -> None:
    """Compare with ONNX Runtime what the op defines, for sequences of different lengths.

    Args:
        attributes: Of the op.
        inputs: Of the op.
        first: Whether this is the first step, whose outputs may be padded at the end.
    """
    text = node_text(f"{OP}{attributes}>", inputs, outputs="y,key,value")
    feeds = {name: each for name, each in inputs.items() if each is not None}
    found, expected = run_program(text, feeds), run_model(build(text), feeds)
    for sequence, count in enumerate(inputs["lengths"] + 1):
        rows = slice(0, count if first else None)
        for name, part in (("y", rows), ("key", np.s_[:, :count]), ("value", np.s_[:, :count])):
            np.testing.assert_allclose(
                found[name][sequence][part], expected[name][sequence][part], atol=TOLERANCE
            )
        assert found["key"].shape == expected["key"].shape


@pytest.mark.parametrize("attributes", ["", ", do_rotary=1, local_window_size=2", ", softcap=1.5"])
@pytest.mark.parametrize("room", [None, 12])
def test_group_query_attention_of_different_lengths(attributes: str, room: int | None) -> None:
    later = grouped(3, 1, 6, room, lengths=whole(3, 6, 0))
    valid_rows_agree(attributes, later, first=False)
    prompt = grouped(3, 5, 0, room, lengths=whole(2, 4, 0))
    valid_rows_agree(attributes, prompt, first=True)
    alone = grouped(1, 3, 4, room)
    valid_rows_agree(attributes, alone, first=False)


@pytest.mark.parametrize("attributes", ["", ", do_rotary=1", ", softcap=1.5, smooth_softmax=1"])
@pytest.mark.parametrize("step", [(1, 2, 1), (2, 1, 1)])
def test_group_query_attention_gradients(step: tuple[int, int, int], attributes: str) -> None:
    batch, length, past = step
    total = length + past
    inputs = {
        "q": random_array(batch, length, 8),
        "k": random_array(batch, length, 4, seed=1),
        "v": random_array(batch, length, 4, seed=2),
        "pk": random_array(batch, 1, past, 4, seed=3),
        "pv": random_array(batch, 1, past, 4, seed=4),
        "lengths": np.full(batch, total - 1, np.int32),
        "total": whole(total).reshape(()),
        "cos": random_array(4, 2, seed=5),
        "sin": random_array(4, 2, seed=6),
        "ids": None,
        "ab": random_array(1, 2, length, total, seed=7),
    }
    op = f"GroupQueryAttention<num_heads=2, kv_num_heads=1{attributes}>"
    has_gradients(op, inputs, outputs="y,key,value")


def test_group_query_attention_normalizes_heads() -> None:
    # ONNX Runtime's CPU kernel refuses these weights: the op is put together from others.
    weights = {"qw": random_array(16, seed=8), "kw": random_array(16, seed=9)}
    inputs = grouped(1, 3, 4) | {"ks": None, "vs": None} | weights
    op = f"{OP}, do_rotary=1, qk_norm_epsilon=0.01, k_norm_epsilon=0.02>"
    given = {name: each for name, each in inputs.items() if each is not None}
    found = run_program(node_text(op, inputs), given)["y"]

    def normalized(x: Array, weight: Array, epsilon: float) -> Array:
        heads = x.reshape(1, 3, -1, 16)
        size = np.sqrt((heads**2).mean(-1, keepdims=True) + epsilon)
        result: Array = (heads / size * weight).reshape(x.shape).astype(np.float32)
        return result

    plain = grouped(1, 3, 4) | {
        "q": normalized(inputs["q"], weights["qw"], 0.01),
        "k": normalized(inputs["k"], weights["kw"], 0.02),
    }
    given = {name: each for name, each in plain.items() if each is not None}
    # Without these outputs, ONNX Runtime forgets the past.
    text = node_text(f"{OP}, do_rotary=1>", plain, outputs="y,key,value")
    expected = run_model(build(text), given)["y"]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("attributes", "outputs", "reason"),
    [
        (', k_quant_type="PER_TENSOR"', "y", "a quantized cache not supported"),
        (", sliding_window_cache=1, local_window_size=4", "y", "sliding_window_cache not"),
        (", qk_output=1", "y,,,qk", "the output of scores not supported"),
    ],
)
def test_group_query_attention_refuses(attributes: str, outputs: str, reason: str) -> None:
    inputs = grouped(1, 3, 4)
    text = node_text(f"{OP}{attributes}>", inputs, outputs=outputs)
    with pytest.raises(ModelError, match=reason):
        run_program(text, {name: each for name, each in inputs.items() if each is not None})


def test_group_query_attention_refuses_rotation_without_tables() -> None:
    inputs = grouped(1, 3, 4, cos=None, sin=None)
    text = node_text(f"{OP}, do_rotary=1>", inputs)
    with pytest.raises(ModelError, match="do_rotary without cos_cache and sin_cache"):
        run_program(text, {name: each for name, each in inputs.items() if each is not None})
