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

_NODES = {
    "InstanceNormalization(x, s, b)": ("C", 21),
    "GroupNormalization<num_groups=2>(x, s, b)": ("C", 21),
    "LayerNormalization<axis=2>(x, s, b)": ("last", 21),
    "RMSNormalization<axis=2, epsilon=0.01>(x, s)": ("last", 23),
    "LRN<size=3, alpha=0.5, bias=2.0>(x)": ("", 21),
    "LpNormalization<axis=1>(x)": ("", 21),
    "LpNormalization<p=1>(x)": ("", 21),
    "MeanVarianceNormalization(x)": ("", 21),
}


def _positive(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(0.5, 2, shape).astype(np.float32)


def _weights(node: str) -> dict[str, Array]:
    shape = {"C": (4,), "last": (2, 3), "": None}[_NODES[node][0]]
    if shape is None:
        return {}
    weights = {"s": _positive(*shape), "b": _positive(*shape, seed=1)}
    return {name: array for name, array in weights.items() if f" {name}" in node}


@pytest.mark.parametrize("node", _NODES)
def test_gradients(node: str) -> None:
    live = {name: array.astype(np.float64) for name, array in _weights(node).items()}
    shapes = {"x": (2, 4, 2, 3)} | {name: array.shape for name, array in live.items()}
    inputs = ", ".join(f"double{list(shape)} {name}" for name, shape in shapes.items())
    text = f"g ({inputs}) => (double[A, B, C, D] y) {{ y = {node} }}"
    feeds = {"x": random_array(2, 4, 2, 3, dtype=np.float64), **live}
    gradients_agree(text, feeds, opset=_NODES[node][1])


@pytest.mark.parametrize("node", _NODES)
def test_values(node: str) -> None:
    text = f"g (float[2, 4, 2, 3] x) => (float[A, B, C, D] y) {{ y = {node} }}"
    feeds = {"x": random_array(2, 4, 2, 3)}
    agrees_with_runtime(text, feeds, _weights(node), tolerance=2e-6, opset=_NODES[node][1])


@pytest.mark.parametrize("node", _NODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(node: str, dtype: torch.dtype) -> None:
    text = f"g (float[2, 4, 2, 3] x) => (float[A, B, C, D] y) {{ y = {node} }}"
    model = build(text, _weights(node), opset=_NODES[node][1])
    x = torch.from_numpy(random_array(2, 4, 2, 3))
    y = Program.from_subgraph(model, dtype=dtype)({"x": x})["y"]
    assert y.dtype is dtype
    expected = Program.from_subgraph(model)({"x": x})["y"]
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batch_normalization(rank: int, opset: int) -> None:
    shape = [2, 4, 3, 2][:rank]
    outputs = ", ".join("ABCD"[:rank])
    text = f"""g (float{shape} x) => (float[{outputs}] y) {{
        y = BatchNormalization<epsilon=0.01>(x, s, b, m, v)
    }}"""
    weights = {name: _positive(4, seed=seed) for seed, name in enumerate("sbmv")}
    feeds = {"x": random_array(*shape)}
    agrees_with_runtime(text, feeds, weights, tolerance=2e-6, opset=opset)


def test_parameters_per_element() -> None:
    text = """g (float[2, 2, 3] x) => (float[A, B, C] y) {
        y = BatchNormalization<spatial=0>(x, s, b, m, v)
    }"""
    weights = {name: _positive(2, 3, seed=seed) for seed, name in enumerate("sbmv")}
    x = random_array(2, 2, 3)
    y = run_program(text, {"x": x}, weights, opset=7)["y"]
    scaled = weights["s"] * (x - weights["m"]) / np.sqrt(weights["v"] + 1e-5)
    np.testing.assert_allclose(y, scaled + weights["b"], rtol=1e-5)


@pytest.mark.parametrize("training", [0, 1])
def test_batch_normalization_gradients(training: int) -> None:
    outputs = "double[A, B, C] y" + (", double[2] r, double[2] w" if training else "")
    names = "y, r, w" if training else "y"
    text = f"""g (double[3, 2, 2] x, double[2] s, double[2] b, double[2] m, double[2] v)
        => ({outputs}) {{
        {names} = BatchNormalization<training_mode={training}, momentum=0.75>(x, s, b, m, v)
    }}"""
    feeds = {name: _positive(2, seed=seed).astype(np.float64) for seed, name in enumerate("sbmv")}
    gradients_agree(text, {"x": random_array(3, 2, 2, dtype=np.float64), **feeds})


def test_batch_normalization_before_opset_7() -> None:
    text = """g (float[2, 2, 3] x) => (float[A, B, C] y) {
        y = BatchNormalization<is_test=1>(x, s, b, m, v)
    }"""
    weights = {name: _positive(2, seed=seed) for seed, name in enumerate("sbmv")}
    x = {"x": random_array(2, 2, 3)}
    modern = text.replace("<is_test=1>", "")
    expected = run_program(modern, x, weights)["y"]
    np.testing.assert_array_equal(run_program(text, x, weights, opset=6)["y"], expected)
    with pytest.raises(ModelError, match="is_test is 0"):
        run_program(modern, x, weights, opset=6)


def test_old_training_is_refused() -> None:
    text = """g (float[2, 2, 3] x) => (float[A, B, C] y, float[2] r, float[2] w) {
        y, r, w = BatchNormalization(x, s, b, m, v)
    }"""
    weights = {name: _positive(2, seed=seed) for seed, name in enumerate("sbmv")}
    with pytest.raises(ModelError, match="trains"):
        run_program(text, {"x": random_array(2, 2, 3)}, weights, opset=9)


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (3,)])
@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_scales_that_broadcast(op: str, shape: tuple[int, ...]) -> None:
    text = f"g (float[4, 2, 3] x) => (float[A, B, C] y) {{ y = {op}<axis=1>(x, s) }}"
    weights = {"s": _positive(*shape)}
    feeds = {"x": random_array(4, 2, 3)}
    opset = 23 if op.startswith("RMS") else 17
    found = run_program(text, feeds, weights, opset=opset)["y"]
    whole = run_program(text, feeds, {"s": np.broadcast_to(weights["s"], (2, 3))}, opset=opset)
    np.testing.assert_allclose(found, whole["y"], rtol=1e-6)


def test_statistics_of_a_half_type_are_float32() -> None:
    text = """g (float16[2, 64] x) => (float16[A, B] y, float[A, C] m, float[A, C] i) {
        y, m, i = LayerNormalization(x, s)
    }"""
    x = random_array(2, 64, dtype=np.float16) + np.float16(3)
    results = run_program(text, {"x": x}, {"s": np.ones(64, np.float16)})
    wide = x.astype(np.float64)
    np.testing.assert_allclose(results["m"], wide.mean(1, keepdims=True), rtol=1e-6)
    inverse = 1 / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(results["i"], inverse, rtol=1e-6)
    assert results["m"].dtype == results["i"].dtype == np.float32


def test_one_scale_per_group_before_opset_21() -> None:
    text = """g (float[2, 4, 3] x) => (float[A, B, C] y) {
        y = GroupNormalization<num_groups=2>(x, s, b)
    }"""
    groups = {"s": _positive(2), "b": _positive(2, seed=1)}
    channels = {name: array.repeat(2) for name, array in groups.items()}
    x = {"x": random_array(2, 4, 3)}
    old = run_program(text, x, groups, opset=18)["y"]
    np.testing.assert_array_equal(old, run_program(text, x, channels, opset=21)["y"])


def test_even_windows_reach_further_up() -> None:
    text = "g (float[1, 5, 1, 1] x) => (float[A, B, C, D] y) { y = LRN<size=4, alpha=4.0>(x) }"
    x = np.arange(1, 6, dtype=np.float32).reshape(1, 5, 1, 1)
    squares = [1 + 4 + 9, 1 + 4 + 9 + 16, 4 + 9 + 16 + 25, 9 + 16 + 25, 16 + 25]
    expected = x.flatten() / (1 + np.array(squares)) ** 0.75
    np.testing.assert_allclose(run_program(text, {"x": x})["y"].flatten(), expected, rtol=1e-5)


@pytest.mark.parametrize("node", ["LpNormalization(x)", "MeanVarianceNormalization(x)"])
def test_zeros_have_values_and_gradients(node: str) -> None:
    text = f"g (float[1, 1, 2, 2] x) => (float[A, B, C, D] y) {{ y = {node} }}"
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    y = program_of(text)({"x": x})["y"]
    torch.autograd.backward(y.sum())
    assert not y.any()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_one_element_a_channel() -> None:
    text = "g (float[2, 2, 1] x) => (float[A, B, C] y) { y = InstanceNormalization(x, s, b) }"
    weights = {"s": _positive(2), "b": np.array([3, 4], np.float32)}
    y = run_program(text, {"x": random_array(2, 2, 1)}, weights)["y"]
    assert y.tolist() == [[[3], [4]], [[3], [4]]]
