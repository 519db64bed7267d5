from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.execution.torch import Program
from qcompiler.execution.torch.element_types import to_torch
from tests.support.graphs import Array, build, random_array
from tests.support.torch_programs import agrees_with_runtime, run_program

_RANGES = {
    "int2": (-2, 1), "uint2": (0, 3), "int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127),
    "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How scales lie over a tensor of shape [3, 10]."""

    name: str
    attributes: str
    shape: tuple[int, ...]

    def spread(self, parameter: Array) -> Array:
        """Return a scale for every element, or a zero point."""
        if self.name == "tensor":
            return np.broadcast_to(parameter, (3, 10))
        if self.name.startswith("axis"):
            return np.broadcast_to(
                parameter[:, None] if len(parameter) == 3 else parameter, (3, 10)
            )
        axis, size = (0, 2) if "axis=0" in self.attributes else (1, int(self.name[-1]))
        return parameter.repeat(size, axis)[:3, :10]

    def gather(self, gradient: Array) -> Array:
        """Return the sums of what `spread` sends to each scale."""
        sums = np.zeros(self.shape)
        positions = np.arange(sums.size).reshape(self.shape)
        np.add.at(sums.reshape(-1), self.spread(positions).reshape(-1), gradient.reshape(-1))
        return sums


_LAYOUTS = [
    Layout("tensor", "", ()),
    Layout("axis 0", "<axis=0>", (3,)),
    Layout("axis -1", "<axis=-1>", (10,)),
    Layout("block of 5", "<axis=1, block_size=5>", (3, 2)),
    Layout("broken block of 4", "<axis=1, block_size=4>", (3, 3)),
    Layout("broken block of 2", "<axis=0, block_size=2>", (2, 10)),
]
_layouts = pytest.mark.parametrize("layout", _LAYOUTS, ids=[each.name for each in _LAYOUTS])
_codes = pytest.mark.parametrize("codes", ["int4", "uint4", "int8", "uint8", "int16", "uint16"])


def _parameters(layout: Layout, codes: str) -> dict[str, Any]:
    """Scales at which some values saturate, and zero points of all signs."""
    low, high = _RANGES[codes]
    generator = np.random.default_rng(0)
    scale = generator.uniform(1.5, 2.5, layout.shape) / (high - low)
    zero = generator.integers(max(low, -3), 4, layout.shape)
    dtype = ir.DataType[codes.upper()].numpy()
    return {"scale": np.asarray(scale, np.float32), "zero": np.asarray(zero).astype(dtype)}


class TestForward:
    @_layouts
    @_codes
    def test_quantized_values_are_those_of_the_runtime(self, layout: Layout, codes: str) -> None:
        text = (
            "g (float[3, 10] x) => (int32[3, 10] y)"
            f" {{ q = QuantizeLinear{layout.attributes}(x, scale, zero) y = Cast<to=6>(q) }}"
        )
        weights = _parameters(layout, codes)
        ties = (np.arange(30).reshape(3, 10) - 15.5) * layout.spread(weights["scale"])
        agrees_with_runtime(text, {"x": random_array(3, 10)}, weights, tolerance=0)
        agrees_with_runtime(text, {"x": ties.astype(np.float32)}, weights, tolerance=0)

    @_layouts
    @_codes
    def test_dequantized_values_are_those_of_the_runtime(self, layout: Layout, codes: str) -> None:
        text = (
            "g (float[3, 10] x) => (float[3, 10] y)"
            f" {{ d = DequantizeLinear{layout.attributes}(q, scale, zero) y = Add(d, x) }}"
        )
        low, high = _RANGES[codes]
        values = np.random.default_rng(1).integers(low, high + 1, (3, 10))
        weights = {"q": values.astype(ir.DataType[codes.upper()].numpy())}
        weights |= _parameters(layout, codes)
        agrees_with_runtime(text, {"x": np.zeros((3, 10), np.float32)}, weights, tolerance=0)

    def test_without_zero_points_codes_are_uint8(self) -> None:
        text = "g (float[30] x) => (uint8[30] y) { y = QuantizeLinear(x, scale) }"
        agrees_with_runtime(text, {"x": random_array(30)}, {"scale": np.float32(0.01)}, tolerance=0)

    def test_the_type_of_codes_as_attribute(self) -> None:
        text = "g (float[30] x) => (int16[30] y) { y = QuantizeLinear<output_dtype=5>(x, scale) }"
        agrees_with_runtime(text, {"x": random_array(30)}, {"scale": np.float32(1e-4)}, tolerance=0)

    @pytest.mark.parametrize("scale_type", ["float16", "bfloat16"])
    @pytest.mark.parametrize(("number", "codes"), [(5, "int16"), (4, "uint16"), (3, "int8")])
    def test_codes_of_halves_saturate_in_range(
        self, scale_type: str, number: int, codes: str
    ) -> None:
        # 16 bits round 32767 to 32768, and float16 does not reach 65535.
        text = (
            f"g ({scale_type}[N] x) => ({codes}[N] y)"
            f" {{ y = QuantizeLinear<output_dtype={number}>(x, scale) }}"
        )
        dtype = ir.DataType[scale_type.upper()].numpy()
        x = np.array([60000, -60000, 1], dtype)
        y = run_program(text, {"x": x}, {"scale": np.array(0.5, dtype)})["y"]
        low, high = _RANGES[codes]
        assert y.tolist() == [high, low, 2]

    def test_int32_codes(self) -> None:
        text = "g (int32[N] q) => (float[N] y) { y = DequantizeLinear(q, scale) }"
        q = np.array([-(1 << 24) - 1, 77, (1 << 31) - 1], np.int32)
        agrees_with_runtime(text, {"q": q}, {"scale": np.float32(3e-7)}, tolerance=0)

    @pytest.mark.parametrize("target", ["float8e4m3fn", "float8e5m2"])
    @pytest.mark.parametrize("saturate", [0, 1])
    def test_8_bit_floats(self, target: str, saturate: int) -> None:
        text = (
            "g (float[N] x) => (float[N] y)"
            f" {{ q = QuantizeLinear<saturate={saturate}>(x, scale, zero) y = Cast<to=1>(q) }}"
        )
        zero = np.zeros((), ir.DataType[target.upper()].numpy())
        weights = {"scale": np.float32(0.37), "zero": zero}
        x = np.array([-1e6, -30, -0.01, 0, 0.2, 3.3, 150, 1e5], np.float32)
        agrees_with_runtime(text, {"x": x}, weights, tolerance=0)

    def test_scales_that_are_powers_of_two(self) -> None:
        text = (
            "g (float[2, 4] x) => (float[2, 4] y) {"
            " q = QuantizeLinear<block_size=2, output_dtype=23, precision=1>(x, scale)"
            " y = DequantizeLinear<block_size=2, output_dtype=1>(q, scale) }"
        )
        scale = np.array([[0.5, 2], [1, 4]]).astype(ml_dtypes.float8_e8m0fnu)
        x = random_array(2, 4) * 4
        spread = scale.astype(np.float32).repeat(2, 1)
        expected = (x / spread).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * spread
        y = run_program(text, {"x": x}, {"scale": scale}, opset=25)["y"]
        np.testing.assert_array_equal(y, expected)

    @pytest.mark.parametrize("shift", [0, 5, -5])
    @pytest.mark.parametrize("size", [1, 7, 1000])
    def test_ranges_found_at_run_time(self, shift: float, size: int) -> None:
        text = (
            "g (float[N] x) => (uint8[N] y, float scale, uint8 zero)"
            " { y, scale, zero = DynamicQuantizeLinear(x) }"
        )
        x = random_array(size) + np.float32(shift)
        agrees_with_runtime(text, {"x": x}, tolerance=0)
        agrees_with_runtime(text, {"x": np.zeros(3, np.float32)}, tolerance=0)


class TestGradients:
    """LSQ: Esser et al. 2020, equations 3 to 5; values that round into the range are inside it."""

    @_layouts
    @pytest.mark.parametrize("codes", ["int4", "int8", "uint8"])
    @pytest.mark.parametrize("has_zero", [False, True])
    def test_of_quantizing_and_dequantizing(
        self, layout: Layout, codes: str, has_zero: bool
    ) -> None:
        number = ir.DataType[codes.upper()].value
        attributes = layout.attributes.strip("<>")
        typed = ", ".join(filter(None, [attributes, "" if has_zero else f"output_dtype={number}"]))
        zero = ", zero" if has_zero else ""
        text = (
            "g (float[3, 10] x) => (float[3, 10] y) {"
            f" q = QuantizeLinear{f'<{typed}>' if typed else ''}(x, scale{zero})"
            f" y = DequantizeLinear{layout.attributes}(q, scale{zero}) }}"
        )
        weights = _parameters(layout, codes)
        if not has_zero:
            del weights["zero"]
        x, upstream = random_array(3, 10), random_array(3, 10, seed=1)
        low, high = _RANGES[codes]
        steps = layout.spread(weights["scale"]).astype(np.float64)
        offsets = layout.spread(weights["zero"].astype(int)) if has_zero else np.zeros((3, 10))
        ratio = x / steps
        code = np.rint(ratio) + offsets
        inside = (code >= low) & (code <= high)
        assert 0 < inside.mean() < 1
        to_scale = np.where(inside, np.rint(ratio) - ratio, np.clip(code, low, high) - offsets)

        program = Program.from_subgraph(build(text, weights))
        live = torch.from_numpy(x).requires_grad_()
        scale = torch.from_numpy(weights["scale"]).requires_grad_()
        y = program({"x": live}, weights={"scale": scale})["y"]
        torch.autograd.backward(y, torch.from_numpy(upstream))
        assert live.grad is not None
        assert scale.grad is not None
        # One division and one product in float32.
        np.testing.assert_allclose(live.grad, upstream * inside, rtol=1e-6)
        expected = layout.gather(upstream * to_scale)
        np.testing.assert_allclose(scale.grad, expected, rtol=1e-4, atol=1e-4)

    @_layouts
    @pytest.mark.parametrize("codes", ["int4", "uint4", "int8", "int16"])
    @pytest.mark.parametrize("live_zero", [False, True])
    def test_of_live_codes(self, layout: Layout, codes: str, live_zero: bool) -> None:
        text = (
            "g (float[3, 10] x) => (float[3, 10] y)"
            f" {{ d = DequantizeLinear{layout.attributes}(q, scale, zero) y = Mul(d, x) }}"
        )
        low, high = _RANGES[codes]
        values = np.random.default_rng(1).integers(low, high + 1, (3, 10))
        weights = _parameters(layout, codes)
        weights["q"] = values.astype(ir.DataType[codes.upper()].numpy())
        model = build(text, weights)
        x = random_array(3, 10)
        program = Program.from_subgraph(model)
        live = {name: to_torch(weights[name]).to(torch.float32) for name in weights}
        if not live_zero:
            del live["zero"]
        for each in live.values():
            each.requires_grad_()
        y = program({"x": x}, weights=live)["y"]
        torch.testing.assert_close(y, program({"x": x})["y"], rtol=0, atol=0)
        torch.autograd.backward(y.sum())
        steps, offsets = layout.spread(weights["scale"]), layout.spread(weights["zero"].astype(int))
        expected = {
            "q": x * steps,
            "scale": layout.gather(x * (values - offsets)),
            "zero": layout.gather(-x * steps),
        }
        for name, each in live.items():
            assert each.grad is not None
            np.testing.assert_allclose(each.grad, expected[name], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("target", [23, 17])
    def test_of_small_floats(self, target: int) -> None:
        text = (
            "g (float[N] x, float scale) => (float[N] y) {"
            f" q = QuantizeLinear<output_dtype={target}>(x, scale)"
            " y = DequantizeLinear(q, scale) }"
        )
        largest = 6.0 if target == 23 else 448.0
        dtype = ir.DataType(target).numpy()
        x = np.array([-2, -0.3, 0.1, 1, 0.26, 3]) * largest / 2
        program = Program.from_subgraph(build(text, opset=23))
        live = torch.tensor(x, dtype=torch.float32, requires_grad=True)
        scale = torch.tensor(0.75, requires_grad=True)
        y = program({"x": live, "scale": scale})["y"]
        torch.autograd.backward(y.sum())
        ratio = x / 0.75
        code = np.clip(ratio, -largest, largest).astype(dtype).astype(np.float64)
        inside = np.abs(ratio) <= largest
        assert 0 < inside.mean() < 1
        np.testing.assert_array_equal(y.detach(), (code * 0.75).astype(np.float32))
        assert live.grad is not None
        assert scale.grad is not None
        np.testing.assert_array_equal(live.grad, inside)
        expected = np.where(inside, code - ratio, code).sum()
        np.testing.assert_allclose(scale.grad, expected, rtol=1e-4)

    def test_of_a_range_found_at_run_time(self) -> None:
        text = (
            "g (float[N] x) => (float[N] y)"
            " { q, scale, zero = DynamicQuantizeLinear(x) y = DequantizeLinear(q, scale, zero) }"
        )
        x = random_array(40)
        live = torch.from_numpy(x).requires_grad_()
        torch.autograd.backward(Program.from_subgraph(build(text))({"x": live})["y"].sum())
        scale = (x.max() - x.min()) / np.float32(255)
        zero = np.rint(-x.min() / scale)
        ratio = x / scale
        code = np.rint(ratio) + zero
        inside = (code >= 0) & (code <= 255)
        to_scale = np.where(inside, np.rint(ratio) - ratio, np.clip(code, 0, 255) - zero).sum()
        expected = inside.astype(np.float64)
        expected[x.argmax()] += to_scale / 255
        expected[x.argmin()] -= to_scale / 255
        assert live.grad is not None
        np.testing.assert_allclose(live.grad, expected, rtol=1e-4, atol=1e-4)
