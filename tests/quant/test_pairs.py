"""Limited pairs: the limit holds, costs next to nothing, and makes integer kernels exact."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper

from qcompiler.quant.granularity import PerAxis
from qcompiler.quant.pairs import quantize_rows, reduction_rows, restore_rows
from qcompiler.quant.qtype import INT8, UINT8
from qcompiler.quant.ranges import RangeMethod, quantize_tensor
from qcompiler.quant.scheme import PairLimit, QSpec
from tests.support.calibrated import run_optimized

Array = npt.NDArray[Any]
LIMIT = 128
ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-1e4, 1e4, width=32),
)


def pair_sums(codes: Array) -> Array:
    """Return the sums of neighbours of one sign; of others, the larger magnitude."""
    even = codes.shape[1] // 2 * 2
    first, second = codes[:, 0:even:2].astype(int), codes[:, 1:even:2].astype(int)
    both = np.maximum(first, 0) + np.maximum(second, 0)
    found: Array = np.maximum(both, np.maximum(-first, 0) + np.maximum(-second, 0))
    return found


@given(rows=ROWS, limit=st.sampled_from([64, 128]), dtype=st.sampled_from(["float32", "float16"]))
@settings(deadline=None, max_examples=50)
def test_the_limit_holds(rows: Array, limit: int, dtype: str) -> None:
    codes, scale = quantize_rows(rows, PairLimit(limit, (0,)), 127, dtype)
    assert codes.dtype == np.int8
    assert scale.dtype == dtype
    assert np.abs(codes.astype(int)).max() <= 127
    assert pair_sums(codes).max(initial=0) <= limit


@given(rows=ROWS)
@settings(deadline=None, max_examples=50)
def test_no_code_is_more_than_a_step_and_a_half_away(rows: Array) -> None:
    codes, scale = quantize_rows(rows, PairLimit(LIMIT, (0,)), 127, np.float32)
    exact = rows.astype(np.float64) / scale[:, np.newaxis]
    away = np.abs(codes - exact)
    assert away.max() <= 1.5 + 1e-3
    even = codes.shape[1] // 2 * 2
    in_pairs = np.minimum(away[:, 0:even:2], away[:, 1:even:2])
    assert in_pairs.max(initial=0) <= 0.5 + 1e-3, "one code of a pair gives way, not both"


@given(rows=ROWS)
@settings(deadline=None, max_examples=50)
def test_the_scale_is_the_smallest_that_can_do(rows: Array) -> None:
    _, scale = quantize_rows(rows, PairLimit(LIMIT, (0,)), 127, np.float32)
    magnitude = np.abs(rows).max(axis=1)
    widest = pair_sums_of_values(rows)
    wanted = np.maximum(magnitude / 127, widest / LIMIT)
    np.testing.assert_allclose(scale[wanted > 1e-30], wanted[wanted > 1e-30], rtol=1e-6)


def pair_sums_of_values(rows: Array) -> Array:
    even = rows.shape[1] // 2 * 2
    first, second = rows[:, 0:even:2], rows[:, 1:even:2]
    both = np.maximum(first, 0) + np.maximum(second, 0)
    largest = np.maximum(both, np.maximum(-first, 0) + np.maximum(-second, 0))
    found: Array = largest.max(axis=1, initial=0)
    return found


def test_opposite_signs_and_an_odd_end_are_free() -> None:
    rows = np.array([[127, -127, 1], [0, 0, 127]], np.float32)
    codes, scale = quantize_rows(rows, PairLimit(LIMIT, (0,)), 127, np.float32)
    assert codes.tolist() == [[127, -127, 1], [0, 0, 127]]
    assert scale.tolist() == [1, 1]


def test_what_was_rounded_up_further_gives_way() -> None:
    # A scale that float16 rounds down makes steps that add up to more than the limit.
    rows = np.random.default_rng(0).uniform(0.3, 1, (400, 2)).astype(np.float32)
    codes, scale = quantize_rows(rows, PairLimit(LIMIT, (0,)), 127, np.float16)
    steps = rows / scale.astype(np.float32)[:, np.newaxis]
    beyond = np.rint(steps).sum(axis=1) > LIMIT
    assert beyond.any()
    assert (codes[beyond].astype(int).sum(axis=1) == LIMIT).all()
    lowered = np.argmax(np.rint(steps) - codes, axis=1)
    raised = np.argmax(np.rint(steps) - steps, axis=1)
    assert (lowered == raised)[beyond].all()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e38])
def test_extreme_rows(value: float) -> None:
    rows = np.full((1, 4), value, np.float32)
    codes, scale = quantize_rows(rows, PairLimit(LIMIT, (0,)), 127, np.float32)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert pair_sums(codes).max() <= LIMIT


@pytest.mark.parametrize(
    ("shape", "axis", "axes"),
    [((6, 5), 1, (0,)), ((5, 6), 0, (1,)), ((4, 3, 2, 5), 0, (2, 3, 1)), ((4, 3, 7), 0, (2, 1))],
)
def test_rows_follow_the_kernel_and_come_back(
    shape: tuple[int, ...], axis: int, axes: tuple[int, ...]
) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    pairs = PairLimit(LIMIT, axes)
    rows = reduction_rows(values, axis, pairs)
    assert rows.shape == (shape[axis], values.size // shape[axis])
    assert (restore_rows(rows, shape, axis, pairs) == values).all()
    if len(shape) == 4:
        assert rows[1, 1] == values[1, 1, 0, 0], "channels last: input channels are neighbours"


def test_refuses_axes_that_are_not_all() -> None:
    with pytest.raises(ValueError, match="not those of a tensor of rank 3"):
        reduction_rows(np.zeros((2, 3, 4), np.float32), 0, PairLimit(LIMIT, (1,)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QSpec(UINT8, PerAxis(0), False, PairLimit(LIMIT, (1,))), "signed symmetric"),
        (QSpec(INT8, PerAxis(0), False, PairLimit(LIMIT, (1,))), "signed symmetric"),
    ],
)
def test_refuses_other_types(spec: QSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_tensor(np.ones((2, 4), np.float32), spec, RangeMethod.MIN_MAX, np.float32)


def test_a_slice_gives_the_slice_of_the_result() -> None:
    values = np.random.default_rng(0).standard_normal((8, 30)).astype(np.float32)
    spec = QSpec(INT8, PerAxis(0), True, PairLimit(LIMIT, (1,)))
    whole = quantize_tensor(values, spec, RangeMethod.MSE, np.float32)
    part = quantize_tensor(values[2:5], spec, RangeMethod.MSE, np.float32)
    assert (whole.codes[2:5] == part.codes).all()
    assert (whole.scale[2:5] == part.scale).all()


# Exactness: every kernel, on the codes that come nearest to saturating it.


def worst_codes(shape: tuple[int, ...], axis: int, axes: tuple[int, ...], seed: int) -> Array:
    """Return codes whose neighbours add up to the limit, or to 254 with opposite signs."""
    generator = np.random.default_rng(seed)
    count = int(np.prod([shape[index] for index in axes]))
    kinds = np.array([[64, 64], [-64, -64], [127, 1], [1, 127], [-127, -1], [127, -127]])
    pairs = kinds[generator.integers(0, len(kinds), (shape[axis], -(-count // 2)))]
    pairs[0], pairs[1 % len(pairs)] = [64, 64], [-127, -1]
    rows = pairs.reshape(shape[axis], -1)[:, :count]
    return restore_rows(rows, shape, axis, PairLimit(LIMIT, axes)).astype(np.int8)


def extreme_data(shape: tuple[int, ...], seed: int) -> Iterator[Array]:
    yield np.full(shape, 255, np.uint8)
    yield np.random.default_rng(seed).choice(np.array([0, 255], np.uint8), shape)
    yield np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def run_op(
    op: str,
    x: Array,
    constants: dict[str, Any],
    inputs: list[str],
    *,
    domain: str = "",
    out: int = TensorProto.UINT8,
    **attributes: Any,
) -> Array:
    node = helper.make_node(op, inputs, ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [None] * x.ndim)],
        [helper.make_tensor_value_info("y", out, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return run_optimized(model.SerializeToString(), {"x": x})[0]["y"]


def requantized(sums: Array, scale: float) -> Array:
    found: Array = np.clip(np.rint(sums * np.float64(scale)) + 128, 0, 255).astype(np.uint8)
    return found


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("reduction", [1, 3, 33, 64, 1000])
def test_integer_products_are_exact(rows: int, reduction: int) -> None:
    codes = worst_codes((reduction, 17), 1, (0,), seed=reduction)
    for x in extreme_data((rows, reduction), rows):
        found = run_op("MatMulInteger", x, {"w": codes, "z": np.uint8(3)}, ["x", "w", "z"], out=6)
        assert (found == (x.astype(np.int64) - 3) @ codes.astype(np.int64)).all()


QLINEAR = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
SCALES: dict[str, Any] = {"xs": np.float32(1), "xz": np.uint8(7), "yz": np.uint8(128)}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("reduction", [33, 256])
@pytest.mark.parametrize("op", ["QLinearMatMul", "QGemm", "QGemm-transB"])
def test_requantized_products_are_exact(op: str, rows: int, reduction: int) -> None:
    codes = worst_codes((reduction, 20), 1, (0,), seed=reduction)
    step = float(2.0 ** -np.ceil(np.log2(reduction * 130)))
    scales = SCALES | {"ws": np.ones(20, np.float32), "wz": np.zeros(20, np.int8)}
    scales |= {"ys": np.float32(1 / step)}
    for x in extreme_data((rows, reduction), rows):
        expected = requantized((x.astype(np.int64) - 7) @ codes.astype(np.int64), step)
        if op == "QLinearMatMul":
            found = run_op(op, x, {"w": codes, **scales}, QLINEAR)
        else:
            turned = op.endswith("transB")
            stored = np.ascontiguousarray(codes.T) if turned else codes
            inputs = [*QLINEAR[:6], "", *QLINEAR[6:]]
            found = run_op(
                "QGemm",
                x,
                {"w": stored, **scales},
                inputs,
                domain="com.microsoft",
                transB=int(turned),
            )
        assert (found == expected).all()


CONVS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "1x1": ((8, 16, 1, 1), {}),
    "1x1-odd": ((8, 7, 1, 1), {}),
    "3x3": ((8, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
    "3x3-odd": ((5, 3, 3, 3), {}),
    "strided": ((8, 16, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "dilated": ((8, 6, 3, 3), {"dilations": [2, 2]}),
    "grouped": ((8, 4, 3, 3), {"group": 2}),
    "grouped-odd": ((6, 3, 3, 3), {"group": 3}),
    "depthwise": ((16, 1, 3, 3), {"group": 16, "pads": [1, 1, 1, 1]}),
    "depthwise-5x5": ((32, 1, 5, 5), {"group": 32, "strides": [2, 2]}),
    "depthwise-twice": ((16, 1, 3, 3), {"group": 8}),
    "1d": ((8, 16, 3), {"pads": [1, 1]}),
    "1d-odd": ((8, 5, 5), {"strides": [2]}),
    "1d-depthwise": ((16, 1, 5), {"group": 16}),
}


def reference_conv(x: Array, codes: Array, zero: int, attributes: dict[str, Any]) -> Array:
    """Convolve in int64."""
    rank, group = codes.ndim - 2, attributes.get("group", 1)
    pads = attributes.get("pads", [0] * 2 * rank)[:rank]
    strides, spread = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    centred = np.pad(x.astype(np.int64) - zero, [(0, 0), (0, 0), *((pad, pad) for pad in pads)])
    sizes = [(kernel - 1) * by + 1 for kernel, by in zip(codes.shape[2:], spread, strict=True)]
    axes = tuple(range(2, 2 + rank))
    windows: Array = sliding_window_view(centred, tuple(sizes), axis=axes)
    steps = (*strides, *spread)
    windows = windows[(slice(None), slice(None), *(slice(None, None, step) for step in steps))]
    letters = "hw"[:rank]
    formula = f"nc{letters}{letters.upper()},oc{letters.upper()}->no{letters}"
    parts = [
        np.einsum(formula, data, kernels.astype(np.int64))
        for data, kernels in zip(
            np.split(windows, group, axis=1), np.split(codes, group), strict=True
        )
    ]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("zero", [0, 7])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_are_exact(name: str, zero: int) -> None:
    shape, attributes = CONVS[name]
    axes = (*range(2, len(shape)), 1)
    codes = worst_codes(shape, 0, axes, seed=len(name))
    channels = shape[1] * int(attributes.get("group", 1))
    step = float(2.0 ** -np.ceil(np.log2(np.prod(shape[1:]) * 130)))
    scales = SCALES | {"ws": np.ones(shape[0], np.float32), "wz": np.zeros(shape[0], np.int8)}
    scales |= {"ys": np.float32(1 / step), "xz": np.uint8(zero)}
    for x in extreme_data((2, channels, *([9] * (len(shape) - 2))), 1):
        expected = requantized(reference_conv(x, codes, zero, dict(attributes)), step)
        found = run_op("QLinearConv", x, {"w": codes, **scales}, QLINEAR, **attributes)
        assert (found == expected).all(), np.abs(found.astype(int) - expected).max()
