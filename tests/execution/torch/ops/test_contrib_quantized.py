"""Quantized products and look-ups of ONNX Runtime: its CPU kernels, and numeric derivatives.

ONNX Runtime's CPU kernels for uint8 by int8 add pairs of products in 16 bits on machines without
VNNI, and saturate. Where A is unsigned and B signed, B is kept within 7 bits here.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import Array, build, random_array
from tests.support.single_nodes import has_gradients, matches_runtime, node_text
from tests.support.torch_programs import run_program

SIGNS = [("uint8", "uint8"), ("uint8", "int8"), ("int8", "int8")]
SHAPES = [(32, 16, 0), (40, 16, 1), (64, 32, 2), (50, 32, 3)]


def codes_of(dtype: str, *shape: int, seed: int = 0) -> Array:
    """Return random codes, the signed ones of 7 bits."""
    low, high = (-64, 64) if dtype == "int8" else (0, 256)
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def scales_of(*shape: int, seed: int = 0) -> Array:
    """Return random scales."""
    return np.random.default_rng(seed).uniform(0.01, 0.3, shape).astype(np.float32)


def matmul_nbits(
    bits: int, columns: int, block: int, zeros: str, seed: int = 0
) -> tuple[str, dict[str, Any]]:
    """Return a MatMulNBits of 5 rows, with all that may be given."""
    rows, blocks = 5, -(-columns // block)
    packed = codes_of("uint8", rows, -(-blocks * bits // 8), seed=seed + 1)
    zero_points = {
        "none": None,
        "packed": packed,
        "flat": packed.reshape(-1),
        "float": random_array(rows, blocks, seed=seed + 2),
    }
    inputs = {
        "a": random_array(2, 3, columns, seed=seed + 3),
        "b": codes_of("uint8", rows, blocks, block * bits // 8, seed=seed),
        "scales": scales_of(rows, blocks, seed=seed),
        "zeros": zero_points[zeros],
        "g": None,
        "bias": random_array(rows, seed=seed + 4),
    }
    return f"MatMulNBits<K={columns}, N={rows}, bits={bits}, block_size={block}>", inputs


@pytest.mark.parametrize(("columns", "block", "seed"), SHAPES)
@pytest.mark.parametrize(
    ("bits", "zeros"),
    [(bits, zeros) for bits in (2, 4, 8) for zeros in ("none", "packed", "flat", "float")][:-1],
)
def test_matmul_nbits(bits: int, zeros: str, columns: int, block: int, seed: int) -> None:
    op, inputs = matmul_nbits(bits, columns, block, zeros, seed)
    matches_runtime(op, inputs, tolerance=2e-4 if bits == 8 else 2e-5)


def test_matmul_nbits_of_8_bits_with_float_zero_points() -> None:
    # ONNX Runtime's CPU kernel refuses these.
    columns, block, seed = 40, 16, 0
    op, inputs = matmul_nbits(8, columns, block, "float", seed)
    blocks = np.repeat(np.arange(-(-columns // block)), block)[:columns]
    codes = inputs["b"].reshape(5, -1)[:, :columns].astype(np.float64)
    weight = (codes - inputs["zeros"][:, blocks]) * inputs["scales"][:, blocks]
    found = run_program(node_text(op, inputs), _given(inputs))["y"]
    np.testing.assert_allclose(found, inputs["a"] @ weight.T + inputs["bias"], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("zeros", ["none", "float"])
def test_matmul_nbits_with_groups_of_columns(zeros: str) -> None:
    op, inputs = matmul_nbits(4, 32, 16, zeros)
    inputs["g"] = np.random.default_rng(0).permutation(np.repeat([0, 1], 16)).astype(np.int32)
    matches_runtime(op, inputs, tolerance=2e-5, weights=("b", "scales", "g"))


def test_matmul_nbits_with_groups_of_columns_and_packed_zero_points() -> None:
    # With g_idx, ONNX Runtime's CPU kernel overlooks packed zero points, and takes 8.
    op, inputs = matmul_nbits(4, 32, 16, "packed")
    groups = np.random.default_rng(0).permutation(np.repeat([0, 1], 16)).astype(np.int32)
    inputs["g"] = groups
    codes = np.stack([inputs["b"] & 15, inputs["b"] >> 4], -1).reshape(5, 32).astype(np.float64)
    zeros = np.concatenate([inputs["zeros"] & 15, inputs["zeros"] >> 4], 1)
    weight = (codes - zeros[:, groups]) * inputs["scales"][:, groups]
    found = run_program(node_text(op, inputs), inputs)["y"]
    np.testing.assert_allclose(found, inputs["a"] @ weight.T + inputs["bias"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_matmul_nbits_without_a_weight(*, biased: bool) -> None:
    op, inputs = matmul_nbits(4, 32, 16, "none")
    inputs |= {"b": inputs["b"][:0], "bias": inputs["bias"] if biased else None}
    matches_runtime(op, inputs, tolerance=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_nbits_in_half(bits: int) -> None:
    op, inputs = matmul_nbits(bits, 40, 16, "packed")
    halves = {
        name: value.astype(np.float16) if getattr(value, "dtype", None) == np.float32 else value
        for name, value in inputs.items()
    }
    matches_runtime(op, halves, tolerance=8e-3 if bits == 4 else 6e-2)


@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmul_nbits_gradients(bits: int, zeros: str) -> None:
    op, inputs = matmul_nbits(bits, 20, 16, zeros)
    has_gradients(op, inputs | {"a": inputs["a"][0, :2]})


@pytest.mark.parametrize(
    ("change", "reason"),
    [("bits=3", "codes of 3 bits"), ("bits=4, weight_prepacked=1", "private to one GPU kernel")],
)
def test_matmul_nbits_refuses(change: str, reason: str) -> None:
    op, inputs = matmul_nbits(4, 32, 16, "none")
    with pytest.raises(ModelError, match=reason):
        run_program(node_text(op.replace("bits=4", change), inputs), _given(inputs))


def _given(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if value is not None}


INDICES = [np.array([[0, 5], [-1, 2]], np.int64), np.array(3, np.int32), np.array([0, 6, -7])]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "columns"), [(2, 64), (2, 40), (4, 64), (4, 40), (8, 40)])
def test_gather_block_quantized_bytes(
    bits: int, columns: int, indices: Array, seed: int, *, zeros: bool
) -> None:
    blocks = -(-columns // 16)
    inputs = {
        "data": codes_of("uint8", 6, columns * bits // 8, seed=seed),
        "indices": indices,
        "scales": random_array(6, blocks, seed=seed),
        "zeros": codes_of("uint8", 6, -(-blocks * bits // 8)) if zeros else None,
    }
    weights = [name for name in ("data", "scales", "zeros") if inputs[name] is not None]
    op = f"GatherBlockQuantized<bits={bits}, block_size=16>"
    matches_runtime(op, inputs, tolerance=0, weights=weights)


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (0, 2), (2, 1), (2, 2), (0, 0), (-1, -2)])
@pytest.mark.parametrize("zeros", [False, True])
def test_gather_block_quantized_4_bits(axes: tuple[int, int], dtype: Any, *, zeros: bool) -> None:
    gathered, blocked = axes
    generator = np.random.default_rng(0)
    low = -8 if dtype is ml_dtypes.int4 else 0
    shape = [20, 3, 40]
    shape[blocked] = -(-shape[blocked] // 16)
    inputs = {
        "data": generator.integers(low, low + 16, (20, 3, 40)).astype(dtype),
        "indices": np.array([[0, 2, -1]], np.int64),
        "scales": random_array(*shape),
        "zeros": generator.integers(low, low + 16, shape).astype(dtype) if zeros else None,
    }
    weights = [name for name in ("data", "scales", "zeros") if inputs[name] is not None]
    op = f"GatherBlockQuantized<block_size=16, gather_axis={gathered}, quantize_axis={blocked}>"
    matches_runtime(op, inputs, tolerance=0, weights=weights)


@pytest.mark.parametrize(("block", "scales"), [(16, (6, 2)), (0, (1, 1)), (0, (6, 1))])
def test_gather_block_quantized_floats_of_8_bits(block: int, scales: tuple[int, ...]) -> None:
    inputs = {
        "data": random_array(6, 32).astype(ml_dtypes.float8_e4m3fn),
        "indices": np.array([0, 5, 2], np.int64),
        "scales": random_array(*scales),
    }
    op = f"GatherBlockQuantized<block_size={block}>"
    matches_runtime(op, inputs, tolerance=0, weights=("data", "scales"))


@pytest.mark.parametrize("axes", [(0, 1), (1, 1)])
def test_gather_block_quantized_gradients(axes: tuple[int, int]) -> None:
    is_same = axes[0] == axes[1]
    inputs = {
        "data": np.random.default_rng(0).integers(0, 16, (4, 40)).astype(ml_dtypes.uint4)
        if is_same
        else codes_of("uint8", 4, 20),
        "indices": np.array([1, 3, 1], np.int64),
        "scales": random_array(4, 3),
    }
    op = f"GatherBlockQuantized<block_size=16, gather_axis={axes[0]}, quantize_axis={axes[1]}>"
    has_gradients(op, inputs, weights=("data",))


def test_gather_block_quantized_refuses_a_packed_axis() -> None:
    inputs = {
        "data": codes_of("uint8", 16, 4),
        "indices": np.array([0]),
        "scales": scales_of(1, 8),
    }
    text = node_text("GatherBlockQuantized<block_size=16, quantize_axis=0>", inputs)
    with pytest.raises(ModelError, match="packed codes with gather_axis 0 and quantize_axis 0"):
        run_program(text, inputs)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_quantize_and_dequantize(axis: int | None, dtype: str) -> None:
    count = () if axis is None else (5,)
    attribute = "" if axis is None else f"<axis={axis}>"
    zeros = codes_of("uint8", *count).astype(dtype)
    scales = scales_of(*count)
    values = {"x": random_array(5, 5) * 10, "s": scales, "z": zeros}
    matches_runtime(f"QuantizeLinear{attribute}", values, tolerance=0)
    codes = {"x": codes_of("uint8", 5, 5).astype(dtype), "s": scales, "z": zeros}
    matches_runtime(f"DequantizeLinear{attribute}", codes, tolerance=0)


def test_quantize_without_a_zero_point() -> None:
    inputs = {"x": random_array(5, 5), "s": scales_of()}
    matches_runtime("QuantizeLinear", inputs, tolerance=0)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("columns", [(), (5,)])
@pytest.mark.parametrize("seed", [0, 1])
def test_dynamic_quantize_matmul(seed: int, columns: tuple[int, ...], dtype: str) -> None:
    inputs = {
        "a": random_array(2, 3, 37, seed=seed),
        "b": codes_of(dtype, 37, 5, seed=seed),
        "s": scales_of(*columns, seed=seed),
        "z": codes_of(dtype, *columns, seed=seed + 1) if seed else None,
        "bias": random_array(5) if seed else None,
    }
    matches_runtime("DynamicQuantizeMatMul", inputs, tolerance=1e-6)


def test_dynamic_quantize_matmul_gradients() -> None:
    # To the float input, those of the quantization as if it rounded nothing.
    inputs = {"a": random_array(3, 8), "b": codes_of("int8", 8, 5), "s": scales_of(5)}
    program = Program.from_subgraph(build(node_text("DynamicQuantizeMatMul", inputs)))
    a = torch.from_numpy(inputs["a"]).requires_grad_()
    scale = torch.from_numpy(inputs["s"]).requires_grad_()
    result = program({"a": a, "b": inputs["b"], "s": scale})["y"]
    torch.autograd.backward(result.sum())
    assert a.grad is not None
    assert scale.grad is not None
    columns = result.detach().sum(0) / scale.detach()
    np.testing.assert_allclose(scale.grad.numpy(), columns.numpy(), rtol=1e-5)
    middle = (a != a.amax()) & (a != a.amin())
    expected = torch.from_numpy(inputs["b"] * inputs["s"]).sum(1).expand_as(a)
    np.testing.assert_allclose(a.grad[middle].numpy(), expected[middle].numpy(), rtol=1e-4)


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("columns", [(), (5,)])
@pytest.mark.parametrize("seed", [0, 1])
def test_matmul_integer_to_float(
    seed: int, columns: tuple[int, ...], signs: tuple[str, str]
) -> None:
    inputs = {
        "a": codes_of(signs[0], 2, 2, 37, seed=seed),
        "b": codes_of(signs[1], 37, 5, seed=seed + 1),
        "a_scale": scales_of(seed=seed),
        "b_scale": scales_of(*columns, seed=seed + 1),
        "a_zero": codes_of(signs[0], seed=seed + 2) if seed else None,
        "b_zero": codes_of(signs[1], *columns, seed=seed + 3) if seed else None,
        "bias": random_array(5) if seed else None,
    }
    matches_runtime("MatMulIntegerToFloat", inputs, tolerance=1e-6)
    has_gradients("MatMulIntegerToFloat", inputs)


def test_matmul_integer_to_float_refuses_parameters_inside_the_sum() -> None:
    inputs = {
        "a": codes_of("uint8", 3, 8),
        "b": codes_of("uint8", 8, 5),
        "a_scale": scales_of(8),
        "b_scale": scales_of(),
    }
    with pytest.raises(ModelError, match="a_scale has 8 elements, not one"):
        run_program(node_text("MatMulIntegerToFloat", inputs), inputs)


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("flags", [(0, 0), (1, 1)])
@pytest.mark.parametrize("as_codes", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_qgemm(
    seed: int, flags: tuple[int, int], signs: tuple[str, str], *, as_codes: bool
) -> None:
    a, b = codes_of(signs[0], 6, 37, seed=seed), codes_of(signs[1], 37, 5, seed=seed + 1)
    columns = (5,) if seed else ()
    inputs = {
        "a": a.T.copy() if flags[0] else a,
        "a_scale": scales_of(seed=seed),
        "a_zero": codes_of(signs[0], seed=seed + 2),
        "b": b.T.copy() if flags[1] else b,
        "b_scale": scales_of(*columns, seed=seed),
        "b_zero": codes_of(signs[1], *columns, seed=seed + 3),
        "c": np.arange(-100, 150, 50, dtype=np.int32) if seed else None,
        "y_scale": np.array(10, np.float32) if as_codes else None,
        "y_zero": codes_of(signs[0], seed=seed + 4) if as_codes else None,
    }
    op = f"QGemm<transA={flags[0]}, transB={flags[1]}, alpha={0.7 + seed}>"
    matches_runtime(op, inputs, tolerance=0 if as_codes else 2e-6)
    if not as_codes:
        has_gradients(op, inputs)


def test_live_codes_carry_gradients() -> None:
    inputs = {
        "a": codes_of("uint8", 3, 8),
        "b": codes_of("int8", 8, 5),
        "a_scale": scales_of(),
        "b_scale": scales_of(),
    }
    text = node_text("MatMulIntegerToFloat", inputs, weights=("b",))
    program = Program.from_subgraph(build(text, {"b": ir.tensor(inputs["b"])}))
    live = torch.from_numpy(inputs["b"].astype(np.float32)).requires_grad_()
    feeds = {name: value for name, value in inputs.items() if name != "b"}
    torch.autograd.backward(program(feeds, weights={"b": live})["y"].sum())
    assert live.grad is not None
    factor = inputs["a_scale"] * inputs["b_scale"]
    expected = inputs["a"].astype(np.float32).sum(0)[:, None] * factor
    np.testing.assert_allclose(live.grad.numpy(), np.broadcast_to(expected, (8, 5)), rtol=1e-5)
