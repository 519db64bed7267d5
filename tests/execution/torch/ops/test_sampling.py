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

_ROIS = [
    [0.3, 0.4, 5.1, 6.2],
    [-2.0, -1.5, 3.0, 2.5],
    [4.2, 3.3, 12.0, 9.0],
    [3.0, 3.0, 3.0, 3.0],
]


def _grid(*shape: int, reach: float = 1.6) -> Array:
    places = np.random.default_rng(1).uniform(-reach, reach, shape)
    return places.astype(np.float32)


@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("aligned", [0, 1])
def test_grid_sample(mode: str, padding: str, aligned: int) -> None:
    attributes = f'mode="{mode}", padding_mode="{padding}", align_corners={aligned}'
    text = f"""g (float[2, 3, 4, 5] x, float[2, 3, 6, 2] p) => (float[A, B, C, D] y) {{
        y = GridSample<{attributes}>(x, p)
    }}"""
    feeds = {"x": random_array(2, 3, 4, 5), "p": _grid(2, 3, 6, 2)}
    agrees_with_runtime(text, feeds, tolerance=2e-5, opset=20)
    old = text.replace("linear", "bilinear").replace("cubic", "bicubic")
    found = run_program(old, feeds, opset=16)["y"]
    np.testing.assert_array_equal(found, run_program(text, feeds, opset=20)["y"])


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_volumes(mode: str, padding: str) -> None:
    text = f"""g (float[1, 2, 3, 4, 5] x, float[1, 2, 3, 2, 3] p) => (float[A, B, C, D, E] y) {{
        y = GridSample<mode="{mode}", padding_mode="{padding}">(x, p)
    }}"""
    feeds = {"x": random_array(1, 2, 3, 4, 5), "p": _grid(1, 2, 3, 2, 3)}
    agrees_with_runtime(text, feeds, tolerance=2e-5, opset=20)


@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("aligned", [0, 1])
def test_signals_are_images_of_one_row(mode: str, padding: str, aligned: int) -> None:
    attributes = f'mode="{mode}", padding_mode="{padding}", align_corners={aligned}'
    text = f"""g (float[1, 2, 5] x, float[1, 6, 1] p) => (float[A, B, C] y) {{
        y = GridSample<{attributes}>(x, p)
    }}"""
    x, places = random_array(1, 2, 5), _grid(1, 6, 1)
    # In an image whose rows are all the same, it does not matter where between them it samples.
    tall = torch.from_numpy(x)[:, :, None].expand(1, 2, 9, 5)
    middle = torch.cat([torch.from_numpy(places), torch.zeros(1, 6, 1)], -1)[:, None]
    name = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    expected = torch.nn.functional.grid_sample(tall, middle, name, padding, bool(aligned))
    found = run_program(text, {"x": x, "p": places}, opset=20)["y"]
    np.testing.assert_allclose(found, expected[:, :, 0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_grid_sample_gradients(mode: str, padding: str) -> None:
    text = f"""g (double[1, 2, 4, 5] x, double[1, 2, 2, 2] p) => (double[A, B, C, D] y) {{
        y = GridSample<mode="{mode}", padding_mode="{padding}">(x, p)
    }}"""
    x = random_array(1, 2, 4, 5, dtype=np.float64)
    gradients_agree(text, {"x": x, "p": _grid(1, 2, 2, 2, reach=0.7).astype(np.float64)})


@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("size", [(2, 3, 4, 6), (2, 3, 2, 4, 3)])
def test_affine_grid(aligned: int, size: tuple[int, ...]) -> None:
    rank = len(size) - 2
    outputs = ", ".join("ABCDE"[: rank + 2])
    text = f"""g (double[2, {rank}, {rank + 1}] t) => (double[{outputs}] y) {{
        y = AffineGrid<align_corners={aligned}>(t, s)
    }}"""
    weights = {"s": np.array(size, np.int64)}
    theta = random_array(2, rank, rank + 1, dtype=np.float64)
    gradients_agree(text, {"t": theta}, weights)
    feeds = {"t": theta.astype(np.float32)}
    agrees_with_runtime(text.replace("double", "float"), feeds, weights, tolerance=1e-5, opset=20)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align(mode: str, coordinates: str, ratio: int) -> None:
    attributes = (
        f'mode="{mode}", coordinate_transformation_mode="{coordinates}", sampling_ratio={ratio}'
    )
    text = f"""g (float[2, 3, 6, 7] x, float[4, 4] r, int64[4] b) => (float[A, B, C, D] y) {{
        y = RoiAlign<{attributes}, output_height=2, output_width=3, spatial_scale=0.9>(x, r, b)
    }}"""
    feeds = {
        "x": random_array(2, 3, 6, 7),
        "r": np.array(_ROIS, np.float32),
        "b": np.array([0, 1, 1, 0]),
    }
    agrees_with_runtime(text, feeds, tolerance=1e-5, opset=16)


def test_roi_align_had_no_half_pixel() -> None:
    text = """g (float[1, 1, 6, 7] x, float[1, 4] r, int64[1] b) => (float[A, B, C, D] y) {
        y = RoiAlign<output_height=2, output_width=2>(x, r, b)
    }"""
    feeds = {
        "x": random_array(1, 1, 6, 7),
        "r": np.array(_ROIS[:1], np.float32),
        "b": np.array([0]),
    }
    agrees_with_runtime(text, feeds, tolerance=1e-5, opset=10)
    assert not np.array_equal(
        run_program(text, feeds, opset=10)["y"], run_program(text, feeds, opset=16)["y"]
    )


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_gradients(mode: str) -> None:
    text = f"""g (double[2, 2, 4, 5] x, double[2, 4] r, int64[2] b) => (double[A, B, C, D] y) {{
        y = RoiAlign<mode="{mode}", output_height=2, sampling_ratio=2>(x, r, b)
    }}"""
    feeds = {
        "x": random_array(2, 2, 4, 5, dtype=np.float64),
        "r": np.array([[0.8, 0.9, 3.5, 3.1], [1.1, 0.7, 4.2, 2.9]]),
        "b": np.array([1, 0]),
    }
    gradients_agree(text, feeds)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_max_roi_pool(scale: float) -> None:
    text = f"""g (float[2, 3, 6, 7] x, float[4, 5] r) => (float[A, B, C, D] y) {{
        y = MaxRoiPool<pooled_shape=[2, 3], spatial_scale={scale}>(x, r)
    }}"""
    images = np.array([[0], [1], [1], [0]], np.float32)
    rois = np.concatenate([images, np.array(_ROIS, np.float32).round()], 1)
    feeds = {"x": random_array(2, 3, 6, 7), "r": rois}
    agrees_with_runtime(text, feeds, tolerance=0, opset=16)


def test_max_roi_pool_gradients() -> None:
    text = """g (double[1, 1, 4, 5] x) => (double[A, B, C, D] y) {
        y = MaxRoiPool<pooled_shape=[2, 2]>(x, r)
    }"""
    x = np.random.default_rng(0).permutation(20).reshape(1, 1, 4, 5).astype(np.float64)
    gradients_agree(text, {"x": x}, {"r": np.array([[0, 1, 0, 4, 3]], np.float64)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    text = """g (float[1, 2, 8, 8] x, float[1, 3, 3, 2] p) => (float[A, B, C, D] y) {
        y = GridSample(x, p)
    }"""
    model = build(text, opset=20)
    feeds = {"x": random_array(1, 2, 8, 8), "p": np.zeros((1, 3, 3, 2), np.float32)}
    y = Program.from_subgraph(model, dtype=dtype)(feeds)["y"]
    assert y.dtype is dtype
    expected = Program.from_subgraph(model)(feeds)["y"]
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ('GridSample<mode="area">(x, p)', "mode is area"),
        ('GridSample<padding_mode="wrap">(x, p)', "padding_mode is wrap"),
        ('GridSample<mode="cubic">(v, q)', "bicubic sampling of 3 spatial axes"),
        ('RoiAlign<mode="sum">(x, r, b)', "mode is sum"),
        ('RoiAlign<coordinate_transformation_mode="full">(x, r, b)', "mode is full"),
    ],
)
def test_refuses(node: str, reason: str) -> None:
    arrays = {
        "x": random_array(1, 1, 4, 4),
        "v": random_array(1, 1, 2, 2, 2),
        "p": _grid(1, 2, 2, 2),
        "q": _grid(1, 2, 2, 2, 3),
        "r": np.array(_ROIS[:1], np.float32),
        "b": np.array([0]),
    }
    read = node[node.index("(") + 1 : -1].split(", ")
    inputs = ", ".join(
        f"{'int64' if name == 'b' else 'float'}{list(arrays[name].shape)} {name}" for name in read
    )
    program = program_of(f"g ({inputs}) => (float[N] y) {{ y = {node} }}")
    with pytest.raises(ModelError, match=reason):
        program({name: arrays[name] for name in read})
