"""Ops from codes to codes of ONNX Runtime: bit-exact with its CPU kernels.

Scales that are powers of two put many values half-way between two codes. Gradients are those of
the same op between a DequantizeLinear and a QuantizeLinear.
"""

from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import Array, build
from tests.support.single_nodes import matches_runtime, node_text
from tests.support.torch_programs import run_program

CASES = [(dtype, seed, even) for dtype in ("uint8", "int8") for seed in (0, 1) for even in (0, 1)]
HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'


class Draw:
    """Random codes, scales and zero points of one type."""

    def __init__(self, dtype: str, seed: int, even: int) -> None:
        """Start with a seed; `even` asks for scales that are powers of two."""
        self._random = np.random.default_rng(seed)
        self._dtype, self._even = np.dtype(dtype), even

    def codes(self, *shape: int) -> Array:
        """Return codes; of no shape, a zero point."""
        limits = np.iinfo(self._dtype)
        return self._random.integers(limits.min, limits.max + 1, shape).astype(self._dtype)

    def scale(self) -> Array:
        """Return a scale."""
        power = 2.0 ** self._random.integers(-3, 1)
        return np.array(power if self._even else self._random.uniform(0.05, 0.3), np.float32)

    def share(self) -> dict[str, Array]:
        """Return the parameters of a result between 0 and 1."""
        zero = 0 if self._dtype == np.uint8 else -128
        return {"ys": np.array(1 / 256, np.float32), "yz": np.array(zero, self._dtype)}


def unary(draw: Draw, *shape: int) -> dict[str, Any]:
    """Return codes, with parameters for them and for the result."""
    return {
        "x": draw.codes(*shape),
        "xs": draw.scale(),
        "xz": draw.codes(),
        "ys": draw.scale(),
        "yz": draw.codes(),
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_binary(op: str, case: tuple[str, int, int]) -> None:
    draw = Draw(*case)
    inputs = {
        "a": draw.codes(20, 30, 40),
        "as_": draw.scale(),
        "az": draw.codes(),
        "b": draw.codes(30, 40),
        "bs": draw.scale(),
        "bz": draw.codes(),
        "cs": draw.scale(),
        "cz": draw.codes(),
    }
    matches_runtime(op, inputs, tolerance=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("zeros", [False, True])
def test_leaky_relu(case: tuple[str, int, int], *, zeros: bool) -> None:
    inputs = unary(Draw(*case), 300)
    # Without the last zero point, ONNX Runtime's type inference ends the process.
    inputs |= {} if zeros else {"xz": None}
    matches_runtime("QLinearLeakyRelu<alpha=0.3>", inputs, tolerance=0)
    matches_runtime("QLinearLeakyRelu", inputs, tolerance=0)


@pytest.mark.parametrize("case", CASES)
def test_sigmoid(case: tuple[str, int, int]) -> None:
    draw = Draw(*case)
    matches_runtime("QLinearSigmoid", unary(draw, 2000) | draw.share(), tolerance=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("axis", "opset"), [(1, 13), (-1, 13), (1, 11), (0, 12), (2, 7)])
def test_softmax(axis: int, opset: int, case: tuple[str, int, int]) -> None:
    draw = Draw(*case)
    inputs = unary(draw, 10, 6, 7) | draw.share()
    matches_runtime(f"QLinearSoftmax<axis={axis}, opset={opset}>", inputs, tolerance=0)


@pytest.mark.parametrize("case", CASES)
def test_concat(case: tuple[str, int, int]) -> None:
    draw = Draw(*case)
    inputs = {"ys": draw.scale(), "yz": draw.codes()}
    for name, width in (("a", 4), ("b", 7), ("c", 2)):
        inputs |= {name: draw.codes(5, width), f"{name}s": draw.scale(), f"{name}z": draw.codes()}
    # One that is in the codes of the result already.
    inputs |= {"cs": inputs["ys"], "cz": inputs["yz"]}
    matches_runtime("QLinearConcat<axis=1>", inputs, tolerance=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attributes", ["", ", count_include_pad=1", ", ceil_mode=1"])
@pytest.mark.parametrize("last", [0, 1])
def test_average_pool(last: int, attributes: str, case: tuple[str, int, int]) -> None:
    shape = (2, 9, 9, 3) if last else (2, 3, 9, 9)
    op = (
        "QLinearAveragePool<kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1], "
        f"channels_last={last}{attributes}>"
    )
    matches_runtime(op, unary(Draw(*case), *shape), tolerance=0)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_average_pool_pads_itself(mode: str) -> None:
    op = f'QLinearAveragePool<kernel_shape=[3, 2], strides=[2, 2], auto_pad="{mode}">'
    matches_runtime(op, unary(Draw("uint8", 0, 0), 2, 3, 9, 8), tolerance=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("last", [0, 1])
def test_global_average_pool(last: int, case: tuple[str, int, int]) -> None:
    shape = (4, 9, 7, 30) if last else (4, 30, 9, 7)
    op = f"QLinearGlobalAveragePool<channels_last={last}>"
    matches_runtime(op, unary(Draw(*case), *shape), tolerance=0)


def gradients(text: str, feeds: dict[str, Any]) -> dict[str, Array]:
    """Return the gradients of a weighted sum of the result to all scales, and to live codes."""
    program = Program.from_subgraph(build(text))
    live = {name: torch.from_numpy(np.array(value)) for name, value in feeds.items()}
    for tensor in live.values():
        if tensor.is_floating_point():
            tensor.requires_grad_()
    result = program(live)["y"]
    weights = torch.linspace(-1, 1, result.numel()).reshape(result.shape)
    torch.autograd.backward((result.double() * weights).sum())
    return {name: each.grad.numpy() for name, each in live.items() if each.grad is not None}


ALIKE = [
    ("QLinearSigmoid", "r = Sigmoid(f)"),
    ("QLinearLeakyRelu<alpha=0.25>", "r = LeakyRelu<alpha=0.25>(f)"),
    ("QLinearSoftmax<axis=1, opset=13>", "r = Softmax<axis=1>(f)"),
    ("QLinearAveragePool<kernel_shape=[2]>", "r = AveragePool<kernel_shape=[2]>(f)"),
    ("QLinearGlobalAveragePool", "r = GlobalAveragePool(f)"),
]


@pytest.mark.parametrize(("op", "alike"), ALIKE)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_of_unary_ops(op: str, alike: str, seed: int) -> None:
    inputs = unary(Draw("uint8", seed, 0), 2, 3, 6) | {"ys": np.array(0.02, np.float32)}
    types = "uint8[2,3,6] x, float xs, uint8 xz, float ys, uint8 yz"
    split = f"""{HEADER} g ({types}) => (y) {{
        f = DequantizeLinear(x, xs, xz) {alike} y = QuantizeLinear(r, ys, yz) }}"""
    found, expected = gradients(node_text(op, inputs), inputs), gradients(split, inputs)
    assert found.keys() == expected.keys() == {"xs", "ys"}
    for name, right in expected.items():
        np.testing.assert_allclose(found[name], right, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_gradients_of_binary_ops(op: str) -> None:
    draw = Draw("int8", 3, 0)
    inputs = {
        name: draw.scale() if name.endswith("s") else draw.codes(*(() if "z" in name else (4, 5)))
        for name in ("a", "a_s", "az", "b", "bs", "bz", "cs", "cz")
    }
    types = "int8[4,5] a, float a_s, int8 az, int8[4,5] b, float bs, int8 bz, float cs, int8 cz"
    split = f"""{HEADER} g ({types}) => (y) {{
        l = DequantizeLinear(a, a_s, az) r = DequantizeLinear(b, bs, bz)
        s = {op}(l, r) y = QuantizeLinear(s, cs, cz) }}"""
    found = gradients(node_text(f"QLinear{op}", inputs), inputs)
    expected = gradients(split, inputs)
    assert found.keys() == expected.keys() == {"a_s", "bs", "cs"}
    for name, right in expected.items():
        np.testing.assert_allclose(found[name], right, rtol=2e-4, atol=2e-4)


def test_concat_refuses_a_part_without_parameters() -> None:
    draw = Draw("uint8", 0, 0)
    inputs = {"ys": draw.scale(), "yz": draw.codes(), "a": draw.codes(3)}
    with pytest.raises(ModelError, match="1 inputs are no triples"):
        run_program(node_text("QLinearConcat<axis=0>", inputs), inputs)
