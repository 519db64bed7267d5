from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import ModelError
from tests.support.graphs import random_array
from tests.support.torch_programs import agrees_with_runtime, gradients_agree, run_program

_ACTIVATION = "g (double[3, 4] x) => (double[3, 4] y) {{ y = {}(x) }}"
_WITH_ATTRIBUTES = [
    "LeakyRelu<alpha=0.3>",
    "Elu<alpha=0.7>",
    "Celu<alpha=0.6>",
    "Selu",
    "Selu<alpha=1.5, gamma=0.8>",
    'Gelu<approximate="tanh">',
    "Gelu",
    "HardSigmoid<alpha=0.3, beta=0.4>",
    "HardSwish",
    "Softplus",
    "Softsign",
    "Mish",
    "ThresholdedRelu<alpha=0.7>",
    "Shrink<lambd=0.4, bias=0.2>",
    "Relu",
    "Sigmoid",
    "Softmax<axis=0>",
    "LogSoftmax",
]


def _spread(*shape: int) -> Any:
    """Values on both sides of every kink, none of them near one."""
    count = int(np.prod(shape))
    return np.random.default_rng(0).permutation(np.linspace(-2.03, 2.11, count)).reshape(shape)


@pytest.mark.parametrize("op", [*_WITH_ATTRIBUTES, "Hardmax"])
def test_gradients(op: str) -> None:
    gradients_agree(_ACTIVATION.format(op), {"x": _spread(3, 4)})


@pytest.mark.parametrize("op", ["Swish", "Swish<alpha=1.7>"])
def test_gradients_of_swish(op: str) -> None:
    gradients_agree(_ACTIVATION.format(op), {"x": _spread(3, 4)}, opset=24)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_gradients_of_swiglu(alpha: float) -> None:
    text = (
        "g (double[3, 4] a, double[3, 4] b) => (double[3, 4] y)"
        f" {{ y = SwiGLU<alpha={alpha:.1f}>(a, b) }}"
    )
    gradients_agree(text, {"a": _spread(3, 4), "b": _spread(4, 3).T.copy()}, opset=28)


@pytest.mark.parametrize("shape", [(1,), (), (3, 1, 1), (2, 3, 4, 5)])
def test_gradients_of_slopes(shape: tuple[int, ...]) -> None:
    dims = ", ".join(map(str, shape))
    text = (
        f"g (double[2, 3, 4, 5] x, double[{dims}] slope) => (double[2, 3, 4, 5] y)"
        " { y = PRelu(x, slope) }"
    )
    slope = random_array(*shape, dtype=np.float64, seed=1)
    gradients_agree(text, {"x": _spread(2, 3, 4, 5), "slope": slope})


@pytest.mark.parametrize("op", _WITH_ATTRIBUTES)
def test_agrees_with_the_runtime(op: str) -> None:
    text = f"g (float[3, 4] x) => (float[3, 4] y) {{ y = {op}(x) }}"
    # Exponentials differ in the last bits; Gelu in ONNX Runtime uses a polynomial for erf.
    agrees_with_runtime(text, {"x": _spread(3, 4).astype(np.float32) * 3}, tolerance=2e-6)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("attributes", ["", "<axis=0>", "<axis=2>", "<axis=-1>", "<axis=-2>"])
@pytest.mark.parametrize("opset", [11, 12, 13])
def test_softmax_spans_all_later_axes_before_opset_13(op: str, attributes: str, opset: int) -> None:
    text = f"g (float[B, C, 5] x) => (float[B, C, 5] y) {{ y = {op}{attributes}(x) }}"
    x = {"x": random_array(2, 3, 5)}
    agrees_with_runtime(text, x, tolerance=1e-6, opset=opset)


def test_hardmax_takes_the_first_of_equals() -> None:
    text = "g (float[4] x) => (float[4] y) { y = Hardmax(x) }"
    y = run_program(text, {"x": np.array([1, 3, 3, 0], np.float32)})["y"]
    assert y.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("type_", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["Softmax", "Gelu", "Elu", "HardSwish", "Selu", "Mish", "Shrink"])
def test_halves_are_computed_as_floats_are(op: str, type_: str) -> None:
    dtype = ir.DataType[type_.upper()].numpy()
    x = random_array(4, 64).astype(dtype)
    half = run_program(f"g ({type_}[A, B] x) => ({type_}[A, B] y) {{ y = {op}(x) }}", {"x": x})
    full = run_program(
        f"g (float[A, B] x) => (float[A, B] y) {{ y = {op}(x) }}", {"x": x.astype(np.float32)}
    )
    assert half["y"].dtype == dtype
    # One rounding at the end, two for Selu: half a unit of the last place is 2**-11 and 2**-8.
    last = 2.0**-10 if type_ == "float16" else 2.0**-7
    np.testing.assert_allclose(half["y"].astype(np.float32), full["y"], rtol=last, atol=1e-6)


@pytest.mark.parametrize("type_", ["int8", "int32"])
def test_relu_of_integers(type_: str) -> None:
    text = f"g ({type_}[N] x) => ({type_}[N] y) {{ y = Relu(x) }}"
    agrees_with_runtime(text, {"x": np.arange(-4, 4).astype(type_)}, tolerance=0)


def test_slopes_by_channel_before_opset_7() -> None:
    text = "g (float[2, 3, 4] x, float[3] slope) => (float[2, 3, 4] y) { y = PRelu(x, slope) }"
    x, slope = random_array(2, 3, 4), random_array(3, seed=1)
    y = run_program(text, {"x": x, "slope": slope}, opset=6)["y"]
    np.testing.assert_array_equal(y, np.where(x < 0, x * slope[:, None], x))


def test_slopes_of_integers() -> None:
    text = "g (int32[4] x, int32[1] slope) => (int32[4] y) { y = PRelu(x, slope) }"
    x = np.array([-2, -1, 0, 1], np.int32)
    y = run_program(text, {"x": x, "slope": np.array([3], np.int32)})["y"]
    assert y.tolist() == [-6, -3, 0, 1]


class TestDropout:
    @pytest.mark.parametrize("opset", [7, 10])
    def test_keeps_everything(self, opset: int) -> None:
        text = "g (float[4] x) => (float[4] y) { y = Dropout<ratio=0.9>(x) }"
        agrees_with_runtime(text, {"x": random_array(4)}, tolerance=0, opset=opset)

    def test_mask_keeps_everything(self) -> None:
        text = "g (float[4] x, bool t) => (float[4] y, bool[4] m) { y, m = Dropout(x, , t) }"
        feeds = {"x": random_array(4), "t": np.array(False)}
        agrees_with_runtime(text, feeds, tolerance=0)

    def test_training_at_ratio_zero_keeps_everything(self) -> None:
        text = "g (float[4] x, bool t) => (float[4] y) { y = Dropout(x, zero, t) }"
        x = random_array(4)
        y = run_program(text, {"x": x, "t": np.array(True)}, {"zero": np.float32(0)})["y"]
        np.testing.assert_array_equal(y, x)

    def test_training_is_refused(self) -> None:
        text = "g (float[4] x, bool t) => (float[4] y) { y = Dropout(x, , t) }"
        with pytest.raises(ModelError, match="training_mode is true"):
            run_program(text, {"x": random_array(4), "t": np.array(True)})

    def test_training_before_opset_7_is_refused(self) -> None:
        text = "g (float[4] x) => (float[4] y) { y = Dropout(x) }"
        with pytest.raises(ModelError, match="is_test is 0"):
            run_program(text, {"x": random_array(4)}, opset=6)

    def test_inference_before_opset_7(self) -> None:
        text = "g (float[4] x) => (float[4] y) { y = Dropout<is_test=1>(x) }"
        x = random_array(4)
        np.testing.assert_array_equal(run_program(text, {"x": x}, opset=6)["y"], x)


def test_unknown_approximation_is_refused() -> None:
    text = 'g (float[4] x) => (float[4] y) { y = Gelu<approximate="sigmoid">(x) }'
    with pytest.raises(ModelError, match="approximate is 'sigmoid', not none or tanh"):
        run_program(text, {"x": random_array(4)})


def test_gates_of_another_shape_are_refused() -> None:
    text = "g (float[2, 4] a, float[4] b) => (float[2, 4] y) { y = SwiGLU(a, b) }"
    with pytest.raises(ModelError, match=r"shapes \[2, 4\] and \[4\] differ"):
        run_program(text, {"a": random_array(2, 4), "b": random_array(4)}, opset=28)
