"""Fused float ops of ONNX Runtime: its CPU kernels, and numeric derivatives."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from tests.support.graphs import random_array
from tests.support.single_nodes import has_gradients, matches_runtime, node_text
from tests.support.torch_programs import run_program

ATTRIBUTES = list(itertools.product((0, 1), repeat=4))
UNARY = ["Gelu", "QuickGelu", "QuickGelu<alpha=1.0>", "QuickGelu<alpha=0.5>", "FastGelu"]
GEMM_ACTIVATIONS = ["Relu", "Sigmoid", "Softsign", "Tanh", "LeakyRelu", "Elu"]
GEMM_ACTIVATIONS += ["ThresholdedRelu", "HardSigmoid", "Celu"]
CONV_ACTIVATIONS = [
    "",
    'activation="Relu"',
    'activation="Sigmoid"',
    'activation="Tanh"',
    'activation="HardSwish"',
    'activation="LeakyRelu", activation_params=[0.3]',
    'activation="HardSigmoid", activation_params=[0.3, 0.4]',
    'activation="Clip", activation_params=[-0.5, 0.6]',
]


def matmul_inputs(
    flags: tuple[int, ...], seed: int, *, small: bool = False
) -> tuple[str, dict[str, Any]]:
    """Return a FusedMatMul whose result has the same shape whatever is transposed."""
    trans_a, trans_b, batch_a, batch_b = flags
    m, k, n = (2, 1, 2) if small else (5, 4, 6)
    a, b = random_array(3, 2, m, k, seed=seed), random_array(3, 2, k, n, seed=seed + 1)
    a, b = a.swapaxes(-1, -2) if trans_a else a, b.swapaxes(-1, -2) if trans_b else b
    a, b = np.moveaxis(a, -2, 0) if batch_a else a, np.moveaxis(b, -2, 0) if batch_b else b
    op = (
        f"FusedMatMul<transA={trans_a}, transB={trans_b}, transBatchA={batch_a}, "
        f"transBatchB={batch_b}, alpha={0.5 + seed}>"
    )
    return op, {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("flags", ATTRIBUTES)
def test_fused_matmul(flags: tuple[int, ...], seed: int) -> None:
    op, inputs = matmul_inputs(flags, seed)
    matches_runtime(op, inputs, tolerance=1e-6)


@pytest.mark.parametrize("flags", ATTRIBUTES)
def test_fused_matmul_gradients(flags: tuple[int, ...]) -> None:
    has_gradients(*matmul_inputs(flags, 0, small=True))


@pytest.mark.parametrize(
    ("left", "right"), [((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4, 5))]
)
def test_fused_matmul_leaves_vectors(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    flags = f"<transA={int(len(left) == 1)}, transB={int(len(right) == 1)}>"
    inputs = {"a": random_array(*left), "b": random_array(*right, seed=1)}
    matches_runtime(f"FusedMatMul{flags}", inputs, tolerance=1e-6)


def test_fused_matmul_in_half() -> None:
    op, inputs = matmul_inputs((1, 0, 0, 1), 0)
    halves = {name: value.astype(np.float16) for name, value in inputs.items()}
    matches_runtime(op, halves, tolerance=4e-3)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("op", UNARY)
def test_gelu_of_every_kind(op: str, seed: int) -> None:
    x = random_array(3, 4, 8, seed=seed) * 3
    matches_runtime(op, {"x": x}, tolerance=2e-6)
    has_gradients(op, {"x": x[0, 0]})


@pytest.mark.parametrize("op", UNARY)
def test_gelu_of_every_kind_in_half(op: str) -> None:
    matches_runtime(op, {"x": random_array(3, 8, dtype=np.float16)}, tolerance=2e-3)


@pytest.mark.parametrize("op", ["BiasGelu", "FastGelu"])
def test_gelu_of_a_sum(op: str) -> None:
    inputs = {"x": random_array(3, 4, 8), "b": random_array(8, seed=1)}
    matches_runtime(op, inputs, tolerance=2e-6)
    has_gradients(op, {"x": inputs["x"][0, :2], "b": inputs["b"]})


@pytest.mark.parametrize("name", GEMM_ACTIVATIONS)
def test_fused_gemm(name: str) -> None:
    more = "activation_alpha=0.3, activation_beta=0.4, alpha=0.5, beta=2.0"
    op = f'FusedGemm<activation="{name}", transA=1, transB=1, {more}>'
    inputs = {
        "a": random_array(4, 3),
        "b": random_array(5, 4, seed=1),
        "c": random_array(5, seed=2),
    }
    matches_runtime(op, inputs, tolerance=2e-6)
    has_gradients(op, inputs)


def test_fused_gemm_without_c() -> None:
    inputs = {"a": random_array(3, 4), "b": random_array(4, 5, seed=1)}
    matches_runtime('FusedGemm<activation="Relu">', inputs, tolerance=1e-6)


@pytest.mark.parametrize("attributes", CONV_ACTIVATIONS)
@pytest.mark.parametrize("summed", [False, True])
def test_fused_conv(attributes: str, *, summed: bool) -> None:
    op = f"FusedConv<{attributes}{', ' if attributes else ''}pads=[1, 0, 1, 0], strides=[2, 1]>"
    inputs = {
        "x": random_array(1, 2, 5, 4),
        "w": random_array(3, 2, 3, 2, seed=1),
        "b": random_array(3, seed=2),
        "z": random_array(1, 3, 3, 3, seed=3) if summed else None,
    }
    matches_runtime(op, inputs, tolerance=2e-6)


@pytest.mark.parametrize("attributes", CONV_ACTIVATIONS[1:])
def test_fused_conv_gradients(attributes: str) -> None:
    inputs = {
        "x": random_array(1, 2, 3),
        "w": random_array(2, 2, 2, seed=1),
        "b": random_array(2, seed=2),
        "z": random_array(1, 2, 2, seed=3),
    }
    has_gradients(f"FusedConv<{attributes}>", inputs)


@pytest.mark.parametrize(
    ("op", "count", "reason"),
    [
        ('FusedConv<activation="Elu">', 0, "activation 'Elu' with 0 parameters"),
        ('FusedConv<activation="LeakyRelu">', 0, "activation 'LeakyRelu' with 0 parameters"),
        ('FusedGemm<activation="Affine">', 2, "activation 'Affine' is not supported"),
        ("FusedGemm", 2, "activation '' is not supported"),
    ],
)
def test_refuses_activations(op: str, count: int, reason: str) -> None:
    rank = 2 if count else 4
    inputs = {"x": random_array(*[2] * rank), "w": random_array(*[2] * rank)}
    with pytest.raises(ModelError, match=reason):
        run_program(node_text(op, inputs), inputs)


def test_bias_split_gelu() -> None:
    # ONNX Runtime has no CPU kernel.
    x, bias = random_array(2, 3, 8), random_array(8, seed=1)
    inputs = {"x": x, "b": bias}
    found = run_program(node_text("BiasSplitGelu", inputs), inputs)["y"]
    total = torch.from_numpy(x + bias)
    expected = total[..., :4] * torch.nn.functional.gelu(total[..., 4:])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    has_gradients("BiasSplitGelu", inputs)


def test_bias_add() -> None:
    # ONNX Runtime has no CPU kernel.
    inputs = {"x": random_array(2, 3, 4), "b": random_array(4), "s": random_array(2, 3, 4, seed=1)}
    found = run_program(node_text("BiasAdd", inputs), inputs)["y"]
    np.testing.assert_allclose(found, inputs["x"] + inputs["b"] + inputs["s"], rtol=1e-6)
    has_gradients("BiasAdd", inputs)


@pytest.mark.parametrize(
    ("axis", "inner", "bias"),
    [(3, 1, (2, 1, 1, 3)), (3, 0, (1, 1, 2, 3)), (2, 1, (2, 1, 2, 3)), (-1, 0, (2, 3))],
)
def test_bias_softmax(axis: int, inner: int, bias: tuple[int, ...]) -> None:
    # ONNX Runtime has no CPU kernel.
    inputs = {"x": random_array(2, 2, 2, 3), "b": random_array(*bias, seed=1)}
    op = f"BiasSoftmax<axis={axis}, is_inner_broadcast={inner}>"
    found = run_program(node_text(op, inputs), inputs)["y"]
    scores = np.exp(inputs["x"] + inputs["b"])
    axes = tuple(range(axis % 4, 4))
    np.testing.assert_allclose(found, scores / scores.sum(axes, keepdims=True), rtol=1e-5)
    has_gradients(op, inputs)


def test_bias_softmax_refuses_a_bias_that_leaves_a_choice() -> None:
    inputs = {"x": random_array(3, 3, 5), "b": random_array(3, 5)}
    op = "BiasSoftmax<axis=2, is_inner_broadcast=1>"
    with pytest.raises(ModelError, match="a bias of 2 axes for 3 of the scores"):
        run_program(node_text(op, inputs), inputs)


def test_inverse() -> None:
    x = random_array(2, 3, 3) + 3 * np.eye(3, dtype=np.float32)
    matches_runtime("Inverse", {"x": x}, tolerance=1e-5)
    has_gradients("Inverse", {"x": x})


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("diagonal", [None, -1, 2])
def test_trilu(upper: int, diagonal: int | None) -> None:
    k = None if diagonal is None else np.array(diagonal, np.int64)
    inputs = {"x": random_array(2, 3, 4), "k": k}
    matches_runtime(f"Trilu<upper={upper}>", inputs, tolerance=0)
    has_gradients(f"Trilu<upper={upper}>", inputs)


@pytest.mark.parametrize("axis", [0, 1, -1, -2, [1]])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_expand_dims(axis: Any, dtype: Any) -> None:
    x = np.arange(6).reshape(2, 3).astype(dtype)
    inputs = {"x": x, "axis": np.array(axis, np.int32)}
    matches_runtime("ExpandDims", inputs, tolerance=0)


@pytest.mark.parametrize(
    ("start", "limit", "delta"), [(0, 7, None), (5, -3, -2), ([1], [9], [3]), (3, 1, 1)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64])
def test_range(start: Any, limit: Any, delta: Any, dtype: Any) -> None:
    step = None if delta is None else np.array(delta, dtype)
    inputs = {"a": np.array(start, dtype), "b": np.array(limit, dtype), "d": step}
    matches_runtime("Range", inputs, tolerance=0)


def test_range_refuses_a_step_of_zero() -> None:
    inputs = {name: np.array(value, np.int64) for name, value in (("a", 0), ("b", 3), ("d", 0))}
    with pytest.raises(ModelError, match="delta is zero"):
        run_program(node_text("Range", inputs), inputs)


@pytest.mark.parametrize("seed", [0, 1])
def test_unique_keeps_the_order(seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 6, 20).astype(np.float32)
    inputs = {"x": x}
    matches_runtime("Unique", inputs, tolerance=0, outputs="y,idx,counts")
    # ONNX Runtime has a kernel for float32 only.
    whole = {"x": x.astype(np.int64)}
    found = run_program(node_text("Unique", whole, outputs="y,idx,counts"), whole)
    first = run_program(node_text("Unique", inputs, outputs="y,idx,counts"), inputs)
    for name in ("y", "idx", "counts"):
        np.testing.assert_array_equal(found[name], first[name])
