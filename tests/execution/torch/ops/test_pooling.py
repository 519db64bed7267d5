from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import build, random_array
from tests.support.torch_programs import (
    agrees_with_runtime,
    gradients_agree,
    program_of,
    run_program,
)

_POOLS = ["MaxPool", "AveragePool", "LpPool"]
_WINDOWS = [
    "kernel_shape=[2, 3]",
    "kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 1]",
    "kernel_shape=[3, 3], strides=[2, 3], pads=[0, 1, 2, 0]",
    'kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"',
    'kernel_shape=[3, 2], strides=[2, 1], auto_pad="SAME_LOWER"',
    'kernel_shape=[2, 2], strides=[3, 1], auto_pad="VALID"',
]
_NEW = [
    "kernel_shape=[2, 2], dilations=[2, 1]",
    "kernel_shape=[3, 2], strides=[3, 3], ceil_mode=1",
    "kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1",
    "kernel_shape=[2, 3], strides=[3, 2], pads=[1, 0, 0, 2], dilations=[2, 1], ceil_mode=1",
]


def _spread(*shape: int, dtype: Any = np.float64) -> Any:
    """Values of both signs that no small step makes equal, none near zero."""
    count = int(np.prod(shape))
    values = np.random.default_rng(0).permutation(np.linspace(-2.03, 2.05, count))
    return values.reshape(shape).astype(dtype)


def _text(op: str, attributes: str, kind: str = "float") -> str:
    return f"g ({kind}[1, 2, 5, 6] x) => ({kind}[A, B, C, D] y) {{ y = {op}<{attributes}>(x) }}"


@pytest.mark.parametrize("attributes", [_WINDOWS[1], _WINDOWS[2], *_NEW])
@pytest.mark.parametrize("op", _POOLS)
def test_gradients(op: str, attributes: str) -> None:
    gradients_agree(_text(op, attributes, "double"), {"x": _spread(1, 2, 5, 6)}, opset=22)


@pytest.mark.parametrize("op", ["GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"])
def test_global_pools(op: str) -> None:
    text = f"g (double[2, 2, 3, 2] x) => (double[A, B, C, D] y) {{ y = {op}(x) }}"
    gradients_agree(text, {"x": _spread(2, 2, 3, 2)})
    feeds = {"x": _spread(2, 2, 3, 2, dtype=np.float32)}
    agrees_with_runtime(text.replace("double", "float"), feeds, tolerance=1e-6)


@pytest.mark.parametrize("attributes", _WINDOWS)
@pytest.mark.parametrize("op", _POOLS)
@pytest.mark.parametrize("opset", [7, 11])
def test_windows(op: str, attributes: str, opset: int) -> None:
    feeds = {"x": _spread(1, 2, 5, 6, dtype=np.float32)}
    agrees_with_runtime(_text(op, attributes), feeds, tolerance=1e-6, opset=opset)


@pytest.mark.parametrize("attributes", _NEW)
@pytest.mark.parametrize("op", _POOLS)
def test_dilations_and_rounding_up(op: str, attributes: str) -> None:
    feeds = {"x": _spread(1, 2, 5, 6, dtype=np.float32)}
    agrees_with_runtime(_text(op, attributes), feeds, tolerance=1e-6, opset=19)


@pytest.mark.parametrize("attributes", [*_WINDOWS[1:5], *_NEW])
def test_padding_in_the_mean(attributes: str) -> None:
    feeds = {"x": _spread(1, 2, 5, 6, dtype=np.float32)}
    text = _text("AveragePool", f"count_include_pad=1, {attributes}")
    agrees_with_runtime(text, feeds, tolerance=1e-6, opset=19)


@pytest.mark.parametrize("op", _POOLS)
@pytest.mark.parametrize("rank", [1, 3])
def test_spatial_axes(op: str, rank: int) -> None:
    sizes = [5, 6, 4][:rank]
    shape = ", ".join(map(str, [2, 3, *sizes]))
    pads = [1] * rank + [0] * rank
    text = f"""g (float[{shape}] x) => (float[{", ".join("ABCDE"[: rank + 2])}] y) {{
        y = {op}<kernel_shape={[2] * rank}, pads={pads}, strides={[2] * rank}>(x)
    }}"""
    agrees_with_runtime(text, {"x": random_array(2, 3, *sizes)}, tolerance=1e-6)


@pytest.mark.parametrize("op", _POOLS)
def test_one_element_less_than_no_padding_is_none(op: str) -> None:
    text = _text(op, 'kernel_shape=[2, 1], strides=[2, 2], auto_pad="SAME_UPPER"')
    x = {"x": _spread(1, 2, 4, 6, dtype=np.float32)}
    text = text.replace("5, 6", "4, 6")
    expected = run_program(text.replace("SAME_UPPER", "VALID"), x)["y"]
    np.testing.assert_array_equal(run_program(text, x)["y"], expected)


def test_p_was_a_float() -> None:
    text = _text("LpPool", "kernel_shape=[2, 2], p=3.0")
    x = _spread(1, 2, 5, 6, dtype=np.float32)
    expected = run_program(text.replace("3.0", "3"), {"x": x}, opset=11)["y"]
    np.testing.assert_array_equal(run_program(text, {"x": x}, opset=1)["y"], expected)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("attributes", [*_WINDOWS[:5], *_NEW])
def test_places(attributes: str, order: int) -> None:
    text = f"""g (float[2, 2, 5, 6] x) => (float[A, B, C, D] y, int64[A, B, C, D] i) {{
        y, i = MaxPool<storage_order={order}, {attributes}>(x)
    }}"""
    feeds = {"x": _spread(2, 2, 5, 6, dtype=np.float32)}
    agrees_with_runtime(text, feeds, tolerance=0, opset=12)


@pytest.mark.parametrize("code", ["int8", "uint8"])
@pytest.mark.parametrize("attributes", [_WINDOWS[1], _WINDOWS[2]])
def test_codes_stay_codes(code: str, attributes: str) -> None:
    x = np.random.default_rng(0).permutation(60).reshape(1, 2, 5, 6)
    x = (x - 128 if code == "int8" else x).astype(code)
    agrees_with_runtime(_text("MaxPool", attributes, code), {"x": x}, tolerance=0, opset=12)


def test_gradient_through_codes() -> None:
    text = """g (float[1, 1, 4] x) => (float[1, 1, 2] y) {
        q = QuantizeLinear(x, s, z)
        p = MaxPool<kernel_shape=[2], strides=[2], pads=[1, 0]>(q)
        y = DequantizeLinear(p, s, z)
    }"""
    x = torch.tensor([[[-1.1, -2.0, -3.0, 4.0]]], requires_grad=True)
    y = program_of(text, {"s": np.float32(0.5), "z": np.int8(0)})({"x": x})["y"]
    torch.autograd.backward(y.sum())
    assert y.tolist() == [[[-1, -2]]]
    assert x.grad is not None
    assert x.grad.tolist() == [[[1, 1, 0, 0]]]


@pytest.mark.parametrize("op", _POOLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 3])
def test_half_types(op: str, dtype: torch.dtype, rank: int) -> None:
    shape = [1, 2, 5, 6, 4][: rank + 2]
    text = f"""g (float{shape} x) => (float[{", ".join("ABCDE"[: rank + 2])}] y) {{
        y = {op}<kernel_shape={[2] * rank}>(x)
    }}"""
    model, x = build(text), torch.from_numpy(random_array(*shape))
    y = Program.from_subgraph(model, dtype=dtype)({"x": x})["y"]
    assert y.dtype is dtype
    expected = Program.from_subgraph(model)({"x": x})["y"]
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)


def test_no_gradient_is_nan_where_all_is_zero() -> None:
    text = _text("LpPool", "kernel_shape=[2, 2]", "double")
    x = torch.zeros(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(program_of(text)({"x": x})["y"].sum())
    assert x.grad is not None
    assert not x.grad.any()


def test_unpool_undoes_a_pool() -> None:
    text = """g (double[1, 2, 4, 4] x) => (double[A, B, C, D] y) {
        p, i = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(x)
        y = MaxUnpool<kernel_shape=[2, 2], strides=[2, 2]>(p, i, shape)
    }"""
    x = _spread(1, 2, 4, 4)
    y = run_program(text, {"x": x}, {"shape": np.array([1, 2, 5, 6])})["y"]
    blocks = x.reshape(1, 2, 2, 2, 2, 2).max((3, 5), keepdims=True)
    kept = np.where(x.reshape(1, 2, 2, 2, 2, 2) == blocks, blocks, 0).reshape(x.shape)
    np.testing.assert_array_equal(y, np.pad(kept, ((0, 0), (0, 0), (0, 1), (0, 2))))
    gradients_agree(text, {"x": x}, {"shape": np.array([1, 2, 5, 6])})


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("MaxPool<kernel_shape=[2]>(x)", "a kernel of 1 axes over an image of 2"),
        ("MaxPool<kernel_shape=[9, 1]>(x)", "do not fit into images"),
        (
            'MaxPool<kernel_shape=[1, 1], strides=[4, 4], auto_pad="SAME_UPPER">(x)',
            "negative padding",
        ),
        ('AveragePool<kernel_shape=[2, 2], auto_pad="SAME">(x)', "auto_pad is SAME"),
        ("LpPool<kernel_shape=[2, 2], pads=[1]>(x)", "pads has 1 entries"),
        ("MaxUnpool<kernel_shape=[2, 2]>(x, i, s)", "smaller than"),
    ],
)
def test_refuses(node: str, reason: str) -> None:
    text = f"g (float[1, 1, 4, 4] x) => (float[A, B, C, D] y) {{ y = {node} }}"
    weights = {"i": np.zeros((1, 1, 4, 4), np.int64), "s": np.array([1, 1, 4, 4])}
    program = program_of(text, weights if "Unpool" in node else {})
    with pytest.raises(ModelError, match=reason):
        program({"x": random_array(1, 1, 4, 4)})
