from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import Array, build, random_array
from tests.support.torch_programs import (
    agrees_with_runtime,
    gradients_agree,
    program_of,
    run_program,
)

_COORDINATES = ["half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "asymmetric"]
_SCALES = [(1, 1, 2, 3), (1, 1, 0.7, 1.5), (1, 1, 4, 0.5), (1, 1, 1, 2)]
_SIZES = [(1, 2, 10, 12), (1, 2, 3, 9), (1, 2, 1, 6), (2, 2, 4, 1)]
_GRADIENTS = [
    'mode="nearest"',
    'mode="linear"',
    'mode="linear", antialias=1',
    'mode="linear", coordinate_transformation_mode="asymmetric"',
    'mode="cubic"',
    'mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5',
]


def _text(attributes: str, inputs: str, kind: str = "float", shape: str = "1, 2, 5, 6") -> str:
    return (
        f"g ({kind}[{shape}] x) => ({kind}[A, B, C, D] y) {{ y = Resize<{attributes}>({inputs}) }}"
    )


def _scales(values: Sequence[float]) -> dict[str, Array]:
    return {"s": np.array(values, np.float32)}


def _by_reference(text: str, x: Array, weights: dict[str, Array]) -> Array:
    proto = ir.to_proto(build(text, weights))
    results = list(ReferenceEvaluator(proto).run(None, {"x": x}))
    return np.asarray(results[0])


@pytest.mark.parametrize("attributes", _GRADIENTS)
@pytest.mark.parametrize("scales", [(1, 1, 2, 1.5), (1, 1, 0.5, 0.7)])
def test_gradients(attributes: str, scales: Sequence[float]) -> None:
    text = _text(attributes, 'x, "", s', "double")
    gradients_agree(text, {"x": random_array(1, 2, 5, 6, dtype=np.float64)}, _scales(scales))


@pytest.mark.parametrize("coordinates", _COORDINATES)
@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("scales", _SCALES)
def test_nearest(coordinates: str, rounding: str, scales: Sequence[float]) -> None:
    attributes = f'coordinate_transformation_mode="{coordinates}", nearest_mode="{rounding}"'
    feeds = {"x": random_array(1, 2, 5, 6)}
    agrees_with_runtime(_text(attributes, 'x, "", s'), feeds, _scales(scales), tolerance=0)


@pytest.mark.parametrize("coordinates", [*_COORDINATES, "align_corners"])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("sizes", _SIZES)
@pytest.mark.parametrize("antialias", [0, 1])
def test_sizes(coordinates: str, mode: str, sizes: Sequence[int], antialias: int) -> None:
    attributes = f'coordinate_transformation_mode="{coordinates}", mode="{mode}"'
    text = _text(f"{attributes}, antialias={antialias}", 'x, "", "", s', shape="N, 2, 5, 6")
    feeds = {"x": random_array(sizes[0], 2, 5, 6)}
    weights = {"s": np.array(sizes, np.int64)}
    agrees_with_runtime(text, feeds, weights, tolerance=2e-5)


@pytest.mark.parametrize("coordinates", _COORDINATES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("scales", _SCALES)
def test_scales(coordinates: str, mode: str, scales: Sequence[float]) -> None:
    attributes = f'coordinate_transformation_mode="{coordinates}", mode="{mode}"'
    feeds = {"x": random_array(1, 2, 5, 6)}
    agrees_with_runtime(_text(attributes, 'x, "", s'), feeds, _scales(scales), tolerance=2e-5)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("rank", [3, 5])
def test_spatial_axes(mode: str, rank: int) -> None:
    shape = [1, 2, 4, 3, 5][:rank]
    outputs = ", ".join("ABCDE"[:rank])
    text = f'g (float{shape} x) => (float[{outputs}] y) {{ y = Resize<mode="{mode}">(x, "", s) }}'
    weights = _scales([1, 1, 2, 1.5, 3][:rank])
    agrees_with_runtime(text, {"x": random_array(*shape)}, weights, tolerance=1e-5)


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_crop(mode: str) -> None:
    attributes = 'coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=9.0'
    text = _text(f'mode="{mode}", {attributes}', "x, r, s")
    roi = np.array([0, 0, 0.2, -0.2, 1, 1, 0.8, 0.9], np.float32)
    weights = _scales([1, 1, 0.8, 1.5]) | {"r": roi}
    agrees_with_runtime(text, {"x": random_array(1, 2, 5, 6)}, weights, tolerance=2e-5)


def test_crop_of_one_element_is_the_middle() -> None:
    text = _text('mode="linear", coordinate_transformation_mode="tf_crop_and_resize"', "x, r, s")
    roi = np.array([0, 0, 0.25, 0, 1, 1, 0.75, 1], np.float32)
    x = random_array(1, 2, 5, 6)
    y = run_program(text, {"x": x}, _scales([1, 1, 0.2, 1]) | {"r": roi})["y"]
    np.testing.assert_allclose(y, x[:, :, 2:3], rtol=1e-6)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_aspect_ratio(policy: str) -> None:
    attributes = f'mode="linear", axes=[3, 2], keep_aspect_ratio_policy="{policy}"'
    weights = {"s": np.array([11, 8], np.int64)}
    feeds = {"x": random_array(1, 2, 5, 6)}
    text = _text(attributes, 'x, "", "", s')
    agrees_with_runtime(text, feeds, weights, tolerance=1e-5, opset=18)


def test_broken_lengths_of_aligned_corners() -> None:
    # ONNX Runtime rounds 6 * 0.6 to whole elements first; the standard does not.
    text = _text('mode="linear", coordinate_transformation_mode="align_corners"', 'x, "", s')
    weights, x = _scales([1, 1, 1, 0.6]), random_array(1, 2, 5, 6)
    expected = _by_reference(text, x, weights)
    found = run_program(text, {"x": x}, weights)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [(1, 1, 2, 3), (1, 1, 1.5, 2.5), (1, 1, 0.6, 0.5)])
def test_first_resize(mode: str, scales: Sequence[float]) -> None:
    text = _text(f'mode="{mode}"', "x, s")
    feeds = {"x": random_array(1, 2, 5, 6)}
    agrees_with_runtime(text, feeds, _scales(scales), tolerance=1e-5, opset=10)
    if min(scales) < 1:
        return
    upsample = text.replace("Resize", "Upsample")
    agrees_with_runtime(upsample, feeds, _scales(scales), tolerance=1e-5, opset=9)
    listed = ", ".join(str(float(scale)) for scale in scales)
    old = upsample.replace("(x, s)", "(x)").replace(">(x)", f", scales=[{listed}]>(x)")
    agrees_with_runtime(old, feeds, tolerance=1e-5, opset=7)
    oldest = upsample.replace("(x, s)", "(x)").replace("linear", "bilinear")
    oldest = oldest.replace(
        ">(x)", f", height_scale={scales[2]:.1f}, width_scale={scales[3]:.1f}>(x)"
    )
    expected = run_program(old, feeds, opset=7)["y"]
    np.testing.assert_array_equal(run_program(oldest, feeds, opset=1)["y"], expected)


@pytest.mark.parametrize("code", ["int8", "uint8"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_codes_are_rounded_and_saturate(code: str, mode: str) -> None:
    text = _text(f'mode="{mode}"', 'x, "", s', code)
    x = np.random.default_rng(0).choice([0, 127], (1, 2, 5, 6)).astype(code)
    weights = _scales([1, 1, 1.7, 2.2])
    expected = _by_reference(text, x, weights)
    found = run_program(text, {"x": x}, weights)["y"]
    assert found.dtype == x.dtype
    # Places in float32 and float64 differ in the last digit, and so may what lies halfway.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_gradient_through_codes() -> None:
    text = """g (float[1, 1, 2] x) => (float[1, 1, 4] y) <int8[1, 1, 2] q> {
        q = QuantizeLinear(x, c, z)
        r = Resize<mode="linear">(q, "", s)
        y = DequantizeLinear(r, c, z)
    }"""
    weights = _scales([1, 1, 2]) | {"c": np.float32(1), "z": np.int8(0)}
    x = torch.tensor([[[1.0, 4.0]]], requires_grad=True)
    y = program_of(text, weights)({"x": x})["y"]
    torch.autograd.backward(y.sum())
    # 1, 1.75, 3.25, 4, rounded.
    assert y.tolist() == [[[1, 2, 3, 4]]]
    assert x.grad is not None
    assert x.grad.tolist() == [[[2, 2]]]


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("scales", [(1, 1, 2, 2), (1, 1, 1.5, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(mode: str, scales: Sequence[float], dtype: torch.dtype) -> None:
    model = build(_text(f'mode="{mode}"', 'x, "", s'), _scales(scales))
    x = torch.from_numpy(random_array(1, 2, 5, 6))
    y = Program.from_subgraph(model, dtype=dtype)({"x": x})["y"]
    assert y.dtype is dtype
    expected = Program.from_subgraph(model)({"x": x})["y"]
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("attributes", "scales", "reason"),
    [
        ('mode="area"', (1, 1, 2, 2), "mode is area"),
        ('nearest_mode="up"', (1, 1, 2, 2), "nearest_mode is up"),
        ('coordinate_transformation_mode="tf"', (1, 1, 2, 2), "transformation_mode is tf"),
        ('mode="nearest", antialias=1', (1, 1, 2, 2), "no antialiasing"),
        ('mode="linear"', (2, 2), "scales has 2 elements, and needs 4"),
        ('mode="linear"', (), "neither scales nor sizes"),
        ('coordinate_transformation_mode="tf_crop_and_resize"', (1, 1, 2, 2), "roi has 0"),
    ],
)
def test_refuses(attributes: str, scales: Sequence[float], reason: str) -> None:
    program = program_of(_text(attributes, 'x, "", s'), _scales(scales))
    with pytest.raises(ModelError, match=reason):
        program({"x": random_array(1, 2, 5, 6)})


def test_refuses_an_unknown_policy() -> None:
    text = _text('keep_aspect_ratio_policy="fill"', 'x, "", "", s')
    program = program_of(text, {"s": np.array([1, 2, 3, 4])})
    with pytest.raises(ModelError, match="keep_aspect_ratio_policy is fill"):
        program({"x": random_array(1, 2, 5, 6)})
