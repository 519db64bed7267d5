"""Attention, FlexAttention, LinearAttention and RotaryEmbedding: gradients and rare forms."""

from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import Array, build, random_array
from tests.support.torch_programs import (
    agrees_with_runtime,
    gradients_agree,
    program_of,
    run_program,
)

_TOLERANCE = 2e-6
"""Of |error| / max(1, |expected|): float32 sums of up to 8 terms in another order."""
_SHAPES = {
    "Q": (2, 4, 3, 6),
    "K": (2, 2, 5, 6),
    "V": (2, 2, 5, 4),
    "past_key": (2, 2, 2, 6),
    "past_value": (2, 2, 2, 4),
}
"""Four heads of three queries, two heads of five keys, two keys before them."""
_CACHED = "Q, K, V, mask, past_key, past_value"


def _text(inputs: str, attributes: str = "", *, scores: bool = False, dtype: str = "float") -> str:
    """Return a graph of one Attention over heads that lie apart."""
    names = [name for name in inputs.split(", ") if name != '""']
    types = {"kept": "bool", "lengths": "int64"}
    ranks = {"mask": "q, t", "kept": "q, t", "lengths": "b"}
    declared = ", ".join(
        f"{types.get(name, dtype)}[{ranks.get(name, ', '.join(f'{name}{at}' for at in range(4)))}]"
        f" {name}"
        for name in names
    )
    results = ["y", "key", "value"] if scores or "past" in inputs else ["y"]
    results += ["scores"] if scores else []
    outputs = ", ".join(f"{dtype}[e{name}, f{name}, g{name}, h{name}] {name}" for name in results)
    options = f"<{attributes}>" if attributes else ""
    return (
        f"g ({declared}) => ({outputs}) {{ {', '.join(results)} = Attention {options} ({inputs}) }}"
    )


def _feeds(inputs: str, dtype: Any = np.float32) -> dict[str, Any]:
    feeds: dict[str, Any] = {
        name: random_array(*shape, dtype=dtype, seed=seed)
        for seed, (name, shape) in enumerate(_SHAPES.items())
    }
    total = 7 if "past_key" in inputs else 5
    feeds["mask"] = random_array(3, total, dtype=dtype, seed=9)
    feeds["kept"] = random_array(3, total, seed=8) > -0.5
    feeds["lengths"] = np.array([5, 3], np.int64)
    return {name: feeds[name] for name in inputs.split(", ") if name != '""'}


_FORMS = [
    ("Q, K, V", ""),
    ("Q, K, V", "is_causal = 1"),
    ("Q, K, V", "is_causal = 1, scale = 0.3"),
    ("Q, K, V, mask", ""),
    ("Q, K, V, kept", ""),
    ("Q, K, V, mask", "is_causal = 1"),
    ("Q, K, V, kept", "is_causal = 1"),
    (_CACHED, ""),
    (_CACHED, "is_causal = 1"),
    ('Q, K, V, "", past_key, past_value', "is_causal = 1"),
    ("Q, K, V, mask", "softcap = 0.8"),
]


@pytest.mark.parametrize(("inputs", "attributes"), _FORMS)
def test_agrees_with_runtime(inputs: str, attributes: str) -> None:
    feeds = _feeds(inputs)
    agrees_with_runtime(_text(inputs, attributes), feeds, tolerance=_TOLERANCE, opset=23)


@pytest.mark.parametrize(("inputs", "attributes"), _FORMS)
@pytest.mark.parametrize("mode", range(4))
def test_asking_for_scores_changes_no_output(inputs: str, attributes: str, mode: int) -> None:
    feeds = _feeds(inputs)
    fused = run_program(_text(inputs, attributes), feeds, opset=25)["y"]
    modal = f"{attributes}, " if attributes else ""
    text = _text(inputs, f"{modal}qk_matmul_output_mode = {mode}", scores=True)
    found = run_program(text, feeds, opset=25)
    np.testing.assert_allclose(found["y"], fused, rtol=_TOLERANCE, atol=_TOLERANCE)
    if mode == 3:
        values = np.repeat(found["value"], 2, axis=1)
        np.testing.assert_allclose(
            found["scores"] @ values, fused, rtol=_TOLERANCE, atol=_TOLERANCE
        )


@pytest.mark.parametrize(("inputs", "attributes"), _FORMS)
@pytest.mark.parametrize("scores", [False, True])
def test_gradients(inputs: str, attributes: str, scores: bool) -> None:
    text = _text(inputs, attributes, scores=scores, dtype="double")
    gradients_agree(text, _feeds(inputs, np.float64), opset=24)


@pytest.mark.parametrize("scores", [False, True])
def test_a_query_without_keys_has_zeros_and_finite_gradients(scores: bool) -> None:
    feeds = _feeds("Q, K, V, kept", np.float64)
    feeds["kept"][1] = False
    text = _text("Q, K, V, kept", "qk_matmul_output_mode = 3", scores=scores, dtype="double")
    y = run_program(text, feeds, opset=23)["y"]
    assert not y[:, :, 1].any()
    assert y[:, :, 0].all()
    gradients_agree(text, feeds, opset=23)


def _attended(feeds: dict[str, Array], allowed: Array) -> Array:
    """Return attention by its formula, of queries to the keys they are allowed."""
    key, value = (np.repeat(feeds[name].astype(np.float64), 2, axis=1) for name in ("K", "V"))
    scores = feeds["Q"] @ key.swapaxes(-1, -2) / np.sqrt(feeds["Q"].shape[-1])
    exponentials = np.where(allowed, np.exp(scores), 0.0)
    sums = exponentials.sum(-1, keepdims=True)
    return np.asarray(exponentials / np.where(sums == 0, 1, sums) @ value)


@pytest.mark.parametrize("before", [-1, 0, 1])
@pytest.mark.parametrize("after", [-1, 0, 2])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("inputs", ["Q, K, V", 'Q, K, V, "", "", "", lengths'])
def test_windows(before: int, after: int, causal: int, inputs: str) -> None:
    feeds = _feeds(inputs)
    attributes = f"left_window_size = {before}, right_window_size = {after}, is_causal = {causal}"
    found = run_program(_text(inputs, attributes), feeds, opset=25)["y"]
    lengths = feeds.get("lengths", np.array([5, 5]))
    first = lengths - 3 if "lengths" in feeds else np.zeros(2, np.int64)
    place = first[:, None, None, None] + np.arange(3)[:, None]
    key = np.arange(5)
    allowed = key < lengths[:, None, None, None]
    if causal:
        allowed = allowed & (key <= place)
    if before >= 0:
        allowed = allowed & (key >= place - before)
    if after >= 0:
        allowed = allowed & (key <= place + after)
    wanted = _attended(feeds, allowed)
    np.testing.assert_allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE)


def test_a_short_mask_hides_the_keys_beyond_it() -> None:
    feeds = _feeds("Q, K, V, kept")
    feeds["kept"] = np.ones((3, 4), np.bool_)
    found = run_program(_text("Q, K, V, kept"), feeds, opset=24)["y"]
    wanted = _attended(feeds, np.arange(5) < 4)
    np.testing.assert_allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE)


def test_one_query_after_its_past_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments: Any, **options: Any) -> Any:
        masks.append(arguments[3])
        return fused(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    inputs = 'Q, K, V, "", past_key, past_value'
    feeds = _feeds(inputs)
    feeds |= {name: feeds[name][:, :, :1] for name in "QKV"}
    text = _text(inputs, "is_causal = 1")
    agrees_with_runtime(text, feeds, tolerance=_TOLERANCE, opset=23)
    assert masks == [None]


def test_packed_heads_are_those_that_lie_apart() -> None:
    feeds = _feeds("Q, K, V")
    apart = run_program(_text("Q, K, V", "is_causal = 1"), feeds, opset=23)["y"]
    packed = {
        name: value.transpose(0, 2, 1, 3).reshape(2, value.shape[2], -1)
        for name, value in feeds.items()
    }
    text = """g (float[a, b, c] Q, float[a, d, e] K, float[a, d, f] V) => (float[a, b, g] y)
        { y = Attention <is_causal = 1, q_num_heads = 4, kv_num_heads = 2> (Q, K, V) }"""
    found = run_program(text, packed, opset=23)["y"]
    wanted = apart.transpose(0, 2, 1, 3).reshape(2, 3, -1)
    np.testing.assert_allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attributes", ["is_causal = 1", "softcap = 5.0", "softmax_precision = 1"])
def test_halves(dtype: torch.dtype, attributes: str) -> None:
    feeds = _feeds("Q, K, V")
    wanted = run_program(_text("Q, K, V", attributes), feeds, opset=23)["y"]
    name = "float16" if dtype is torch.float16 else "bfloat16"
    rounded = {each: torch.from_numpy(value).to(dtype) for each, value in feeds.items()}
    found = run_program(_text("Q, K, V", attributes, dtype=name), rounded, opset=23)["y"]
    # Four roundings, of inputs, scores, shares and the output; values are up to 3.
    bound = 12 * torch.finfo(dtype).eps
    assert np.abs(found.astype(np.float32) - wanted).max() < bound


def test_softmax_in_another_precision() -> None:
    feeds = _feeds("Q, K, V")
    wanted = run_program(_text("Q, K, V"), feeds, opset=23)["y"]
    double = run_program(_text("Q, K, V", "softmax_precision = 11"), feeds, opset=23)["y"]
    np.testing.assert_allclose(double, wanted, rtol=_TOLERANCE, atol=_TOLERANCE)
    half = run_program(_text("Q, K, V", "softmax_precision = 10"), feeds, opset=23)["y"]
    assert 1e-5 < np.abs(half - wanted).max() < 5e-3


@pytest.mark.parametrize(
    ("inputs", "attributes", "scores", "reason"),
    [
        ('Q, K, V, "", past_key', "", False, "past_key and past_value belong together"),
        ('Q, K, V, "", past_key, past_value, lengths', "", False, "exclude each other"),
        ("Q, K, V", "qk_matmul_output_mode = 4", True, "qk_matmul_output_mode is 4"),
    ],
)
def test_refuses(inputs: str, attributes: str, scores: bool, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        program_of(_text(inputs, attributes, scores=scores), opset=24)(_feeds(inputs))


def test_refuses_a_mask_of_integers() -> None:
    text = """g (float[a, b, c, d] Q, float[a, e, f, d] K, float[a, e, f, g] V, int32[c, f] mask)
        => (float[a, b, c, g] y) { y = Attention (Q, K, V, mask) }"""
    feeds = _feeds("Q, K, V") | {"mask": np.ones((3, 5), np.int32)}
    with pytest.raises(ModelError, match=r"a mask of torch\.int32"):
        program_of(text, opset=23)(feeds)


_FLEX = """<ir_version: 13, opset_import: ["" : 26, "ai.onnx.preview" : 1]>
    g (double[a, b, c, d] Q, double[a, e, f, d] K, double[a, e, f, h] V) => (double[a, b, c, h] y)
    {{ y = ai.onnx.preview.FlexAttention <{}> (Q, K, V) }}"""
_CAP = """score_mod = cap (double[a, b, c, f] s) => (double[a, b, c, f] r)
    { t = Tanh (s) r = Add (t, t) }"""
_SQUARE = """prob_mod = square (double[a, b, c, f] p) => (double[a, b, c, f] r)
    { r = Mul (p, p) }"""


@pytest.mark.parametrize("attributes", ["scale = 0.3", _CAP, _SQUARE, f"{_CAP}, {_SQUARE}"])
def test_flex_attention(attributes: str) -> None:
    feeds = _feeds("Q, K, V", np.float64)
    text = _FLEX.format(attributes)
    key, value = (np.repeat(feeds[name], 2, axis=1) for name in ("K", "V"))
    scale = float(np.float32(0.3)) if "scale" in attributes else 1 / np.sqrt(6)
    scores = feeds["Q"] @ key.swapaxes(-1, -2) * scale
    scores = 2 * np.tanh(scores) if "score_mod" in attributes else scores
    shares = np.exp(scores)
    shares /= shares.sum(-1, keepdims=True)
    shares = shares**2 if "prob_mod" in attributes else shares
    found = run_program(text, feeds)["y"]
    np.testing.assert_allclose(found, shares @ value, rtol=1e-12, atol=1e-12)
    gradients_agree(text, feeds)


_LINEAR = {
    "linear": "q, k, v, past",
    "gated": "q, k, v, past, decay",
    "delta": 'q, k, v, past, "", beta',
    "gated_delta": "q, k, v, past, decay, beta",
}


def _linear_text(inputs: str, rule: str, dtype: str = "double") -> str:
    return (
        f"g ({dtype}[a, b, c] q, {dtype}[a, b, d] k, {dtype}[a, b, e] v, "
        f"{dtype}[a, f, g, h] past, {dtype}[a, b, i] decay, {dtype}[a, b, j] beta) "
        f"=> ({dtype}[a, b, l] y, {dtype}[a, f, g, h] state) {{ y, state = LinearAttention "
        f'<q_num_heads = 4, kv_num_heads = 2, update_rule = "{rule}"> ({inputs}) }}'
    )


def _linear_feeds(decays: int = 2) -> dict[str, Any]:
    shapes = {
        "q": (1, 3, 12),
        "k": (1, 3, 6),
        "v": (1, 3, 4),
        "past": (1, 2, 3, 2),
        "decay": (1, 3, decays),
        "beta": (1, 3, 2),
    }
    return {
        name: random_array(*shape, dtype=np.float64, seed=seed) / 2
        for seed, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("rule", _LINEAR)
@pytest.mark.parametrize("decays", [2, 6])
def test_gradients_of_linear_attention(rule: str, decays: int) -> None:
    program = program_of(_linear_text(_LINEAR[rule], rule), opset=27)
    feeds = {name: torch.from_numpy(value) for name, value in _linear_feeds(decays).items()}
    live = [name for name in _LINEAR[rule].split(", ") if name != '""']

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(program(feeds | dict(zip(live, values, strict=True))).values())

    assert torch.autograd.gradcheck(run, [feeds[name].requires_grad_() for name in live])


def test_linear_attention_goes_on_from_its_state() -> None:
    feeds = _linear_feeds()
    text = _linear_text(_LINEAR["gated_delta"], "gated_delta")
    whole = run_program(text, feeds, opset=27)
    head, tail = (
        {name: value if name == "past" else value[:, part] for name, value in feeds.items()}
        for part in (slice(2), slice(2, 3))
    )
    first = run_program(text, head, opset=27)
    second = run_program(text, tail | {"past": first["state"]}, opset=27)
    joined = np.concatenate((first["y"], second["y"]), 1)
    np.testing.assert_allclose(joined, whole["y"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(second["state"], whole["state"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("inputs", "rule", "reason"),
    [
        ("q, k, v, past", "gated", "'gated' needs decay"),
        ("q, k, v, past, decay, beta", "gated", "'gated' has no beta"),
        ("q, k, v", "mamba", "update_rule is 'mamba'"),
    ],
)
def test_linear_attention_refuses(inputs: str, rule: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        program_of(_linear_text(inputs, rule), opset=27)(_linear_feeds())


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_rotary_embedding(interleaved: int, width: int, packed: bool, positions: bool) -> None:
    half = width // 2
    table, axes = ((9, half), "e, f") if positions else ((2, 3, half), "e, f, g")
    places = ", int64[i, j] places" if positions else ""
    heads = "" if not packed else ", num_heads = 4"
    listed = "x, cos, sin, places" if positions else "x, cos, sin"

    def text(dtype: str) -> str:
        shape = "a, b, c" if packed else "a, b, c, d"
        return (
            f"g ({dtype}[{shape}] x, {dtype}[{axes}] cos, {dtype}[{axes}] sin{places}) "
            f"=> ({dtype}[{shape}] y) {{ y = RotaryEmbedding <interleaved = {interleaved}, "
            f"rotary_embedding_dim = {width if width < 6 else 0}{heads}> ({listed}) }}"
        )

    feeds: dict[str, Any] = {
        "x": random_array(2, 3, 24, seed=1) if packed else random_array(2, 4, 3, 6, seed=1),
        "cos": random_array(*table, seed=2),
        "sin": random_array(*table, seed=3),
    }
    if positions:
        feeds["places"] = np.array([[0, 1, 2], [5, 8, 3]], np.int64)
    agrees_with_runtime(text("float"), feeds, tolerance=_TOLERANCE, opset=23)
    exact = {
        name: value if name == "places" else value.astype(np.float64)
        for name, value in feeds.items()
    }
    gradients_agree(text("double"), exact, opset=23)


def test_rotary_embedding_refuses_tables_of_another_width() -> None:
    text = """g (float[a, b, c, d] x, float[a, c, e] cos) => (float[a, b, c, d] y)
        { y = RotaryEmbedding (x, cos, cos) }"""
    feeds = {"x": random_array(2, 4, 3, 6), "cos": random_array(2, 3, 2)}
    with pytest.raises(ModelError, match="2 angles do not fit 6 elements"):
        program_of(text, opset=23)(feeds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_query_without_keys_has_zeros_on_the_gpu() -> None:
    model = build(_text("Q, K, V, kept", dtype="float16"), opset=23)
    feeds = _feeds("Q, K, V, kept", np.float16)
    feeds["kept"][1] = False
    y = Program.from_subgraph(model, device="cuda")(feeds)["y"]
    assert not y[:, :, 1].any()
    assert y[:, :, 0].all()
