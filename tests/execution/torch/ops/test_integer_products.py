"""QLinearMatMul: bit-exact with ONNX Runtime's CPU kernel."""

from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import Array, build
from tests.support.single_nodes import matches_runtime, node_text
from tests.support.torch_programs import run_program

SIGNS = [("uint8", "uint8"), ("uint8", "int8"), ("int8", "int8")]


def codes_of(dtype: str, *shape: int, seed: int = 0) -> Array:
    """Return random codes, the signed ones of 7 bits.

    ONNX Runtime's kernels for uint8 by int8 saturate in 16 bits on machines without VNNI.
    """
    low, high = (-64, 64) if dtype == "int8" else (0, 256)
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def product(
    signs: tuple[str, str], seed: int, columns: tuple[int, ...], *, even: bool
) -> dict[str, Any]:
    """Return a QLinearMatMul's inputs; `even` asks for scales that are powers of two."""
    generator = np.random.default_rng(seed)

    def scale(*shape: int) -> Array:
        powers = 2.0 ** generator.integers(-3, 1, shape)
        return np.asarray(powers if even else generator.uniform(0.01, 0.3, shape), np.float32)

    return {
        "a": codes_of(signs[0], 2, 7, 37, seed=seed),
        "a_s": scale(),
        "az": codes_of(signs[0], seed=seed + 1),
        "b": codes_of(signs[1], 37, 6, seed=seed + 2),
        "bs": scale(*columns),
        "bz": codes_of(signs[1], *columns, seed=seed + 3),
        "ys": np.array(64 if even else 20, np.float32),
        "yz": codes_of(signs[0], seed=seed + 4),
    }


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("columns", [(), (6,)])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_qlinear_matmul(
    seed: int, columns: tuple[int, ...], signs: tuple[str, str], *, even: bool
) -> None:
    inputs = product(signs, seed, columns, even=even)
    matches_runtime(":QLinearMatMul", inputs, tolerance=0)


def test_rows_have_scales_of_their_own() -> None:
    # ONNX Runtime takes one scale for A and for the result.
    inputs = product(("uint8", "int8"), 0, (6,), even=False)
    inputs |= {"a": inputs["a"][0], "a_s": np.linspace(0.1, 0.4, 7).astype(np.float32)}
    inputs |= {"az": codes_of("uint8", 7, seed=9)}
    found = run_program(node_text(":QLinearMatMul", inputs), inputs)["y"]
    for row in range(7):
        one = inputs | {name: inputs[name][row] for name in ("a_s", "az")}
        one["a"] = inputs["a"][row : row + 1]
        alone = run_program(node_text(":QLinearMatMul", one), one)["y"]
        np.testing.assert_array_equal(found[row], alone[0])


def test_gradients_are_those_of_dequantized_factors() -> None:
    inputs = product(("uint8", "int8"), 0, (6,), even=False)
    split = """g (uint8[2,7,37] a, float a_s, uint8 az, int8[37,6] b, float[6] bs, int8[6] bz,
                  float ys, uint8 yz) => (y) {
        l = DequantizeLinear(a, a_s, az) r = DequantizeLinear<axis=1>(b, bs, bz)
        m = MatMul(l, r) y = QuantizeLinear(m, ys, yz) }"""
    results = []
    for text in (node_text(":QLinearMatMul", inputs), split):
        program = Program.from_subgraph(build(text))
        live = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        scales = [live[name].requires_grad_() for name in ("a_s", "bs", "ys")]
        torch.autograd.backward(program(live)["y"].sum())
        results.append([scale.grad for scale in scales])
    for found, expected in zip(*results, strict=True):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_refuses_codes_of_unknown_type() -> None:
    inputs = product(("uint8", "int8"), 0, (), even=False)
    inputs["yz"] = inputs["yz"].astype(np.int32)
    with pytest.raises(ModelError, match="codes of type INT32 are not supported"):
        run_program(node_text(":QLinearMatMul", inputs), inputs)


def test_codes_with_gradients_pass_an_integer_product() -> None:
    text = """g (float[2, 4] x, float z) => (float[2, 3] y) {
        q, s, zero = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, w, zero)
        c = Cast<to = 1>(i)
        y = Mul(c, s)
    }"""
    w = np.arange(12, dtype=np.int8).reshape(4, 3)
    program = Program.from_subgraph(build(text.replace(", float z", ""), {"w": w}))
    x = torch.tensor([[1.0, 2, 3, 4], [-1, 0.5, 2, 1]], requires_grad=True)
    result = program({"x": x})["y"]
    torch.testing.assert_close(result.detach(), program({"x": x.detach()})["y"])
    (gradient,) = torch.autograd.grad(result.sum(), [x])
    inside = gradient[0, 1:3]  # neither the smallest nor the largest: no gradient by the scale
    assert inside.tolist() == [12, 21]
