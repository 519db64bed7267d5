import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import Array, build, random_array
from tests.support.torch_programs import agrees_with_runtime, gradients_agree, run_program

_UNARY = "g (double[3, 4] x) => (double[3, 4] y) {{ y = {}(x) }}"
_BINARY = "g (double[2, 3, 4] a, double[3, 1] b) => (double[2, 3, 4] y) {{ y = {}(a, b) }}"
_VARIADIC = (
    "g (double[3, 4] a, double[4] b, double[3, 1] c) => (double[3, 4] y) {{ y = {}(a, b, c) }}"
)


def _away_from_steps(*shape: int, low: float = 0.1, high: float = 0.9, seed: int = 0) -> Array:
    """Values in the open unit interval, where no op of the file has a kink."""
    return np.random.default_rng(seed).uniform(low, high, shape)


@pytest.mark.parametrize(
    "op",
    [
        "Abs",
        "Acos",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "Ceil",
        "Cos",
        "Cosh",
        "Erf",
        "Exp",
        "Floor",
        "Log",
        "Neg",
        "Reciprocal",
        "Round",
        "Sign",
        "Sin",
        "Sinh",
        "Sqrt",
        "Tan",
        "Tanh",
    ],
)
def test_gradients_of_one_input(op: str) -> None:
    gradients_agree(_UNARY.format(op), {"x": _away_from_steps(3, 4, high=0.45)})


def test_gradient_of_acosh() -> None:
    gradients_agree(_UNARY.format("Acosh"), {"x": 1.5 + _away_from_steps(3, 4)})


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Pow"])
def test_gradients_of_two_inputs(op: str) -> None:
    inputs = {"a": _away_from_steps(2, 3, 4), "b": _away_from_steps(3, 1, seed=1)}
    gradients_agree(_BINARY.format(op), inputs)


@pytest.mark.parametrize("attributes", ["", "<fmod=1>"])
def test_gradients_of_remainders(attributes: str) -> None:
    inputs = {"a": 1.1 + _away_from_steps(2, 3, 4, high=0.6), "b": np.full((3, 1), 0.8)}
    gradients_agree(_BINARY.format("Mod" + attributes), inputs)


@pytest.mark.parametrize("op", ["Max", "Min", "Sum", "Mean"])
def test_gradients_of_many_inputs(op: str) -> None:
    shapes = {"a": (3, 4), "b": (4,), "c": (3, 1)}
    inputs = {
        name: _away_from_steps(*shape, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    gradients_agree(_VARIADIC.format(op), inputs)


def test_gradients_of_clip_reach_its_bounds() -> None:
    text = "g (double[8] x, double low, double high) => (double[8] y) { y = Clip(x, low, high) }"
    inputs = {"x": np.linspace(-2, 2, 8), "low": np.float64(-1.1), "high": np.float64(1.2)}
    gradients_agree(text, inputs)


def test_gradients_of_where() -> None:
    text = (
        "g (bool[3, 4] c, double[3, 4] a, double[4] b) => (double[3, 4] y) { y = Where(c, a, b) }"
    )
    inputs = {"c": random_array(3, 4) > 0, "a": random_array(3, 4, dtype=np.float64)}
    gradients_agree(text, {**inputs, "b": random_array(4, dtype=np.float64, seed=2)})


def test_squares_and_roots_of_constants_have_gradients() -> None:
    text = "g (double[5] x) => (double[5] y, double[5] z) { y = Pow(x, two) z = Pow(x, half) }"
    weights = {"two": np.float64(2), "half": np.array([0.5])}
    gradients_agree(text, {"x": _away_from_steps(5)}, weights)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_integers_are_divided_towards_zero(dtype: str) -> None:
    a = np.array([-7, 7, -8, 100, 0], np.int64).astype(dtype)
    b = np.array([2, 2, 3, 7, 5], np.int64).astype(dtype)
    text = f"g ({dtype}[N] a, {dtype}[N] b) => ({dtype}[N] y) {{ y = Div(a, b) }}"
    agrees_with_runtime(text, {"a": a, "b": b}, tolerance=0)


@pytest.mark.parametrize(
    ("base", "exponent"), [("float", "int64"), ("int64", "float"), ("int32", "int32")]
)
def test_power_keeps_the_type_of_its_base(base: str, exponent: str) -> None:
    text = f"g ({base}[N] a, {exponent}[N] b) => ({base}[N] y) {{ y = Pow(a, b) }}"
    a = np.array([1, 2, 3], np.float32 if base == "float" else base)
    b = np.array([3, 2, 1], np.float32 if exponent == "float" else exponent)
    agrees_with_runtime(text, {"a": a, "b": b}, tolerance=1e-6)


def test_power_of_one_element_has_the_shape_of_both() -> None:
    text = "g (float[N] a) => (float[M, N] y) { y = Pow(a, two) }"
    weights = {"two": np.array([[2.0]], np.float32)}
    assert run_program(text, {"a": random_array(3)}, weights)["y"].shape == (1, 3)


@pytest.mark.parametrize("type_", ["float16", "bfloat16"])
def test_halves_stay_halves(type_: str) -> None:
    text = (
        f"g ({type_}[3] x) => ({type_}[3] y) {{ a = Exp(x) b = Clip(a, low, high) y = Mul(a, b) }}"
    )
    dtype = ir.DataType[type_.upper()].numpy()
    weights = {"low": np.array(0, dtype), "high": np.array(2, dtype)}
    x = random_array(3).astype(dtype)
    y = run_program(text, {"x": x}, weights)["y"]
    assert y.dtype == dtype
    exp = np.exp(x.astype(np.float32))
    # Two roundings to 8 bits.
    np.testing.assert_allclose(y.astype(np.float32), exp * exp.clip(0, 2), rtol=3e-2)


def test_mod_of_floats_has_the_sign_of_the_divisor() -> None:
    text = "g (float[N] a, float[N] b) => (float[N] y) { y = Mod(a, b) }"
    a = np.array([5.5, -5.5, 5.5, 0.0, 6.0, -1.0, np.inf, 1.0], np.float32)
    b = np.array([2.0, 2.0, -2.0, -3.0, -3.0, np.inf, 1.0, 0.0], np.float32)
    y = run_program(text, {"a": a, "b": b}, opset=28)["y"]
    expected = np.array([1.5, 0.5, -0.5, -0.0, -0.0, np.inf, np.nan, np.nan], np.float32)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y[:6]), np.signbit(expected[:6]))


class TestClip:
    def test_before_opset_11_bounds_are_attributes(self) -> None:
        text = (
            "g (float[N] x) => (float[N] y, float[N] z)"
            " { y = Clip<min=-0.5, max=0.5>(x) z = Clip(x) }"
        )
        agrees_with_runtime(text, {"x": random_array(9)}, tolerance=0, opset=10)

    def test_an_upper_bound_alone(self) -> None:
        text = "g (float[N] x, float high) => (float[N] y) { y = Clip(x, , high) }"
        feeds = {"x": random_array(9), "high": np.array(0.25, np.float32)}
        agrees_with_runtime(text, feeds, tolerance=0)

    def test_the_upper_bound_wins(self) -> None:
        text = "g (float[N] x) => (float[N] y) { y = Clip(x, low, high) }"
        weights = {"low": np.float32(1), "high": np.float32(-1)}
        y = run_program(text, {"x": random_array(9)}, weights)["y"]
        np.testing.assert_array_equal(y, np.full(9, -1, np.float32))

    def test_bounds_beyond_a_narrower_type_limit_nothing(self) -> None:
        text = "g (float[N] x) => (float[N] y) { y = Clip<min=-3.4e38, max=6.0>(x) }"
        model = build(text, opset=10)
        program = Program.from_subgraph(model, dtype=torch.float16)
        y = program({"x": np.array([-70.0, 3.0, 9.0], np.float32)})["y"]
        assert y.tolist() == [-70.0, 3.0, 6.0]

    def test_integers(self) -> None:
        text = "g (int8[N] x) => (int8[N] y) { y = Clip(x, low, high) }"
        weights = {"low": np.int8(-3), "high": np.int8(100)}
        agrees_with_runtime(text, {"x": np.arange(-128, 128, dtype=np.int8)}, weights, tolerance=0)


class TestBroadcastBeforeOpset7:
    def test_axis_says_where(self) -> None:
        text = (
            "g (float[2, 3, 4] a, float[3] b) => (float[2, 3, 4] y)"
            " { y = Add<broadcast=1, axis=1>(a, b) }"
        )
        a, b = random_array(2, 3, 4), random_array(3, seed=1)
        y = run_program(text, {"a": a, "b": b}, opset=6)["y"]
        np.testing.assert_array_equal(y, a + b[:, None])

    def test_without_axis_the_last_ones_match(self) -> None:
        text = "g (float[2, 3] a, float[3] b) => (bool[2, 3] y) { y = Less<broadcast=1>(a, b) }"
        a, b = random_array(2, 3), random_array(3, seed=1)
        np.testing.assert_array_equal(run_program(text, {"a": a, "b": b}, opset=6)["y"], a < b)

    def test_one_element_matches_all(self) -> None:
        text = "g (float[2] a, float[1, 1] b) => (float[2] y) { y = Mul<broadcast=1>(a, b) }"
        a, b = random_array(2), random_array(1, 1, seed=1)
        y = run_program(text, {"a": a, "b": b}, opset=6)["y"]
        np.testing.assert_array_equal(y, a * b[0])

    def test_other_shapes_are_refused(self) -> None:
        text = "g (float[2, 3] a, float[3] b) => (float[2, 3] y) { y = Add(a, b) }"
        with pytest.raises(ModelError, match="differ without broadcast=1"):
            run_program(text, {"a": random_array(2, 3), "b": random_array(3)}, opset=6)


@pytest.mark.parametrize(
    ("attributes", "found"),
    [
        ("", [True, True, False]),
        ("<detect_negative=0>", [True, False, False]),
        ("<detect_positive=0>", [False, True, False]),
        ("<detect_positive=0, detect_negative=0>", [False, False, False]),
    ],
)
def test_infinities_in_the_directions_asked_for(attributes: str, found: list[bool]) -> None:
    text = f"g (float[3] x) => (bool[3] y) {{ y = IsInf{attributes}(x) }}"
    x = np.array([np.inf, -np.inf, np.nan], np.float32)
    assert run_program(text, {"x": x})["y"].tolist() == found


def test_shifts_by_the_width_and_more_leave_the_sign() -> None:
    text = (
        "g (int8[N] x, int8[N] n) => (int8[N] l, int8[N] r)"
        ' { l = BitShift<direction="LEFT">(x, n) r = BitShift<direction="RIGHT">(x, n) }'
    )
    x, n = np.array([-3, 3, -3, 64, -128], np.int8), np.array([8, 9, -1, 1, 1], np.int8)
    results = run_program(text, {"x": x, "n": n}, opset=28)
    assert results["l"].tolist() == [0, 0, 0, -128, 0]
    assert results["r"].tolist() == [-1, 0, -1, 32, -64]


def test_an_unknown_direction_is_refused() -> None:
    text = 'g (uint8[1] x) => (uint8[1] y) { y = BitShift<direction="UP">(x, x) }'
    with pytest.raises(ModelError, match="direction is 'UP', not LEFT or RIGHT"):
        run_program(text, {"x": np.array([1], np.uint8)})


def test_strings_are_compared_and_chosen() -> None:
    text = (
        "g (string[N] a, string[N] b) => (bool[N] e, string[N] y)"
        " { e = Equal(a, b) y = Where(e, a, b) }"
    )
    a, b = np.array(["x", "y"], object), np.array(["x", "z"], object)
    results = run_program(text, {"a": a, "b": b})
    assert results["e"].tolist() == [True, False]
    assert results["y"].tolist() == ["x", "z"]
