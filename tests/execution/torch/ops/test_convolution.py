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

_WINDOWS = [
    "group=1",
    "strides=[2, 1], pads=[1, 1, 1, 1]",
    "pads=[1, 0, 2, 1], dilations=[2, 1]",
    'auto_pad="SAME_UPPER", strides=[2, 3]',
    'auto_pad="SAME_LOWER", strides=[2, 3]',
    'auto_pad="VALID", group=2',
]


@pytest.mark.parametrize("attributes", _WINDOWS)
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_gradients(op: str, attributes: str) -> None:
    inputs = "double[1, 4, 4, 3] x, double[4, K, 3, 2] w, double[M] b"
    group = 2 if "group=2" in attributes else 1
    text = f"g ({inputs}) => (double[A, B, C, D] y) {{ y = {op}<{attributes}>(x, w, b) }}"
    arrays = {
        "x": random_array(1, 4, 4, 3, dtype=np.float64),
        "w": random_array(4, 4 // group, 3, 2, dtype=np.float64, seed=1),
        "b": random_array(4, dtype=np.float64, seed=2),
    }
    gradients_agree(text, arrays)


@pytest.mark.parametrize("attributes", _WINDOWS)
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("opset", [1, 11, 22])
def test_windows(op: str, attributes: str, opset: int) -> None:
    group = 2 if "group=2" in attributes else 1
    weights = {"w": random_array(4, 4 // group, 3, 2, seed=1), "b": random_array(4, seed=2)}
    # Otherwise its padding of the SAME kinds falls short of the sizes that the standard asks for.
    if op == "ConvTranspose":
        attributes = attributes.replace("strides=[2, 3]", "strides=[2, 2]")
    text = f"g (float[2, 4, 7, 6] x) => (float[A, B, C, D] y) {{ y = {op}<{attributes}>(x, w, b) }}"
    agrees_with_runtime(text, {"x": random_array(2, 4, 7, 6)}, weights, tolerance=1e-5, opset=opset)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("rank", [1, 3])
def test_spatial_axes(op: str, rank: int) -> None:
    sizes, kernel = [5, 6, 4][:rank], [2, 3, 2][:rank]
    pads = [1, 0, 1][:rank] + [0, 2, 0][:rank]
    shape = ", ".join(map(str, [2, 3, *sizes]))
    text = f"""g (float[{shape}] x) => (float[{", ".join("ABCDE"[: rank + 2])}] y) {{
        y = {op}<pads={pads}>(x, w)
    }}"""
    weights = {"w": random_array(3, 3, *kernel, seed=1)}
    agrees_with_runtime(text, {"x": random_array(2, 3, *sizes)}, weights, tolerance=1e-5)


@pytest.mark.parametrize(
    "attributes",
    [
        "strides=[3, 2], output_padding=[2, 1]",
        "strides=[2, 2], pads=[1, 0, 0, 1], output_padding=[1, 0]",
        "strides=[2, 2], output_shape=[10, 11]",
        'strides=[2, 2], output_shape=[9, 10], auto_pad="SAME_UPPER"',
        "strides=[2, 2], output_shape=[10, 12], output_padding=[1, 1]",
    ],
)
def test_transposed_sizes(attributes: str) -> None:
    text = f"""g (float[1, 2, 5, 6] x) => (float[A, B, C, D] y) {{
        y = ConvTranspose<{attributes}>(x, w, b)
    }}"""
    weights = {"w": random_array(2, 3, 3, 2, seed=1), "b": random_array(3, seed=2)}
    agrees_with_runtime(text, {"x": random_array(1, 2, 5, 6)}, weights, tolerance=1e-5)


def test_transposed_zeros_reach_the_wanted_size() -> None:
    # Windows cover 3 of 5 elements: the rest is the bias alone.
    text = """g (float[1, 1, 3] x) => (float[1, 1, N] y) {
        y = ConvTranspose<output_shape=[5]>(x, w, b)
    }"""
    weights = {"w": np.ones((1, 1, 1), np.float32), "b": np.array([7], np.float32)}
    y = run_program(text, {"x": np.array([[[1, 2, 3]]], np.float32)}, weights)["y"]
    assert y.tolist() == [[[8, 9, 10, 7, 7]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    text = "g (float[1, 4, 5, 5] x) => (float[A, B, C, D] y) { y = Conv<pads=[1, 1, 0, 1]>(x, w) }"
    x, w = torch.from_numpy(random_array(1, 4, 5, 5)), random_array(2, 4, 3, 3, seed=1)
    model = build(text, {"w": w})
    y = Program.from_subgraph(model, dtype=dtype)({"x": x})["y"]
    assert y.dtype is dtype
    expected = Program.from_subgraph(model)({"x": x})["y"]
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ('Conv<auto_pad="SAME">(x, w)', "auto_pad is SAME"),
        ("Conv<kernel_shape=[2, 2]>(x, w)", "kernel_shape says"),
        ("Conv<strides=[2]>(x, w)", "strides has 1 entries for 2 spatial axes"),
        ("Conv<pads=[1, 1]>(x, w)", "pads has 2 entries for 2 spatial axes"),
        ("Conv<dilations=[4, 1]>(x, w)", "do not fit"),
        ('ConvTranspose<auto_pad="SAME">(x, w)', "auto_pad is SAME"),
    ],
)
def test_refuses(node: str, reason: str) -> None:
    text = f"g (float[1, 3, 6, 6] x) => (float[A, B, C, D] y) {{ y = {node} }}"
    program = program_of(text, {"w": random_array(3, 3, 3, 3)})
    with pytest.raises(ModelError, match=reason):
        program({"x": random_array(1, 3, 6, 6)})


def test_refuses_an_unknown_activation() -> None:
    text = """g (float[1, 3, 6] x) => (float[A, B, C] y, float[A, B, D] p) {
        y, p = CausalConvWithState<activation="relu">(x, w)
    }"""
    program = program_of(text, {"w": random_array(3, 1, 3)}, opset=27)
    with pytest.raises(ModelError, match="activation is relu"):
        program({"x": random_array(1, 3, 6)})


def test_refuses_four_spatial_axes() -> None:
    text = "g (float[1, 1, 2, 2, 2, 2] x) => (float[A, B, C, D, E, F] y) { y = Conv(x, w) }"
    program = program_of(text, {"w": random_array(1, 1, 2, 2, 2, 2)})
    with pytest.raises(ModelError, match="4 spatial axes are not supported"):
        program({"x": random_array(1, 1, 2, 2, 2, 2)})


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("code", ["uint8", "int8"])
def test_quantized(code: str, group: int) -> None:
    # Weights of 7 bits: some CPUs saturate sums of uint8 * int8 pairs in ONNX Runtime.
    generator = np.random.default_rng(0)
    low, high = (0, 256) if code == "uint8" else (-128, 128)
    text = f"""g ({code}[2, 4, 6, 7] x) => ({code}[A, B, C, D] y) {{
        y = QLinearConv<group={group}, pads=[0, 1, 0, 0], strides=[2, 1]>(
            x, xs, xz, w, ws, wz, ys, yz, b
        )
    }}"""
    weights = {
        "xs": np.float32(0.05),
        "xz": np.array(low + 100, code),
        "w": generator.integers(-63, 64, (4, 4 // group, 3, 2), np.int8),
        "ws": np.array([0.01, 0.02, 0.03, 0.04], np.float32),
        "wz": np.zeros(4, np.int8),
        "ys": np.float32(0.7),
        "yz": np.array(low + 120, code),
        "b": generator.integers(-500, 500, 4, np.int32),
    }
    x = generator.integers(low, high, (2, 4, 6, 7)).astype(code)
    agrees_with_runtime(text, {"x": x}, weights, tolerance=0, opset=10)


def test_gradient_through_quantized_codes() -> None:
    text = """g (float[1, 1, 3] x) => (float[1, 1, 2] y) {
        q = QuantizeLinear(x, s, z)
        c = QLinearConv(q, s, z, w, s, z, s, z)
        y = DequantizeLinear(c, s, z)
    }"""
    weights = {
        "s": np.float32(0.5),
        "z": np.int8(0),
        "w": np.array([[[2, -4]]], np.int8),
    }
    x = torch.tensor([[[1.0, 2.0, 3.0]]], requires_grad=True)
    y = program_of(text, weights)({"x": x})["y"]
    torch.autograd.backward(y.sum())
    # Without the rounding, y[i] = x[i] - 2 * x[i + 1].
    assert y.tolist() == [[[-3, -4]]]
    assert x.grad is not None
    assert x.grad.tolist() == [[[1, -1, -2]]]


def test_integer_zero_points_per_channel() -> None:
    generator = np.random.default_rng(0)
    text = "g (uint8[1, 2, 5] x) => (int32[A, B, C] y) { y = ConvInteger(x, w, a, b) }"
    x = generator.integers(0, 256, (1, 2, 5), np.uint8)
    w = generator.integers(0, 256, (3, 2, 2), np.uint8)
    zeros = np.array([3, 128, 250], np.uint8)
    y = run_program(text, {"x": x}, {"w": w, "a": np.uint8(7), "b": zeros}, opset=10)["y"]
    steps, kernels = x.astype(int) - 7, w.astype(int) - zeros[:, None, None]
    expected = [
        [int((kernels[m] * steps[0, :, i : i + 2]).sum()) for i in range(4)] for m in range(3)
    ]
    assert y.tolist() == [expected]


@pytest.mark.parametrize("sizes", [[9], [5, 6], [3, 4, 3]])
def test_col2im(sizes: list[int]) -> None:
    # It is the adjoint of taking windows apart, which Conv with an identity kernel does.
    rank = len(sizes)
    block = [2] * rank
    pads, strides = [1] + [0] * (2 * rank - 1), [2] + [1] * (rank - 1)
    attributes = f"pads={pads}, strides={strides}"
    taps = 2**rank
    image = torch.from_numpy(random_array(1, 1, *sizes, dtype=np.float64)).requires_grad_()
    shape = ", ".join(map(str, [1, 1, *sizes]))
    outputs = ", ".join("ABCDE"[: rank + 2])
    kernel = np.eye(taps).reshape(taps, 1, *block)
    apart = program_of(
        f"g (double[{shape}] x) => (double[{outputs}] y) {{ y = Conv<{attributes}>(x, w) }}",
        {"w": kernel},
    )
    columns = apart({"x": image})["y"]
    given = torch.from_numpy(random_array(*columns.shape, dtype=np.float64, seed=1))
    torch.autograd.backward((columns * given).sum())
    inputs = f"double[1, {taps}, L] x, int64[{rank}] i, int64[{rank}] b"
    text = f"""g ({inputs}) => (double[{outputs}] y) {{
        y = Col2Im<{attributes}>(x, i, b)
    }}"""
    flat = given.flatten(2).numpy()
    feeds = {"x": flat, "i": np.array(sizes), "b": np.array(block)}
    y = run_program(text, feeds)["y"]
    assert image.grad is not None
    np.testing.assert_allclose(y, image.grad.numpy(), rtol=1e-12)
    gradients_agree(text, feeds)


def test_deform_conv_gradients() -> None:
    inputs = "double[1, 2, 4, 4] x, double[2, 1, 2, 2] w, double[1, 16, 3, 3] o"
    text = f"""g ({inputs}, double[2] b, double[1, 8, 3, 3] m) => (double[A, B, C, D] y) {{
        y = DeformConv<group=2, offset_group=2>(x, w, o, b, m)
    }}"""
    generator = np.random.default_rng(0)
    feeds = {
        "x": generator.standard_normal((1, 2, 4, 4)),
        "w": generator.standard_normal((2, 1, 2, 2)),
        # Away from whole pixels, where bilinear interpolation has a kink.
        "o": generator.uniform(0.2, 0.4, (1, 16, 3, 3)),
        "b": generator.standard_normal(2),
        "m": generator.standard_normal((1, 8, 3, 3)),
    }
    gradients_agree(text, feeds)


def test_deform_conv_without_offsets_is_a_convolution() -> None:
    attributes = "pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2]"
    weights = {"w": random_array(4, 3, 2, 3, seed=1)}
    plain = f"g (float[2, 3, 5, 7] x) => (float[A, B, C, D] y) {{ y = Conv<{attributes}>(x, w) }}"
    expected = run_program(plain, {"x": random_array(2, 3, 5, 7)}, weights)["y"]
    text = plain.replace("Conv<", "DeformConv<").replace("(x, w)", "(x, w, o)")
    weights["o"] = np.zeros((2, 12, *expected.shape[2:]), np.float32)
    found = run_program(text, {"x": random_array(2, 3, 5, 7)}, weights)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_causal_convolution_in_steps() -> None:
    text = """g (double[1, 2, L] x, double[1, 2, 2] p) => (double[1, 2, L] y, double[1, 2, 2] q) {
        y, q = CausalConvWithState<activation="silu">(x, w, b, p)
    }"""
    weights = {"w": random_array(2, 1, 3, dtype=np.float64), "b": np.array([0.5, -1])}
    x = random_array(1, 2, 6, dtype=np.float64, seed=1)
    empty = np.zeros((1, 2, 2))
    whole = run_program(text, {"x": x, "p": empty}, weights, opset=27)
    first = run_program(text, {"x": x[..., :2], "p": empty}, weights, opset=27)
    second = run_program(text, {"x": x[..., 2:], "p": first["q"]}, weights, opset=27)
    joined = np.concatenate([first["y"], second["y"]], 2)
    np.testing.assert_allclose(joined, whole["y"], rtol=1e-12)
    np.testing.assert_array_equal(second["q"], x[..., -2:])
    gradients_agree(text, {"x": x, "p": empty}, weights, opset=27)
