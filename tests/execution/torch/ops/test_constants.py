"""Constants, ranges and shapes."""

import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import build
from tests.support.torch_programs import agrees_with_runtime, gradients_agree, run_program


@pytest.mark.parametrize(
    ("attribute", "declared"),
    [
        ("value_int = 7", "int64"),
        ("value_ints = [7, -8]", "int64[2]"),
        ("value_float = 0.5", "float"),
        ("value_floats = [0.5, -1.5]", "float[2]"),
    ],
)
def test_numbers_as_attributes_are_constants(attribute: str, declared: str) -> None:
    text = f"g () => ({declared} y) {{ c = Constant<{attribute}>() y = Identity(c) }}"

    agrees_with_runtime(text, {}, tolerance=0)


def test_texts_as_attributes_are_arrays_of_strings() -> None:
    text = 'g () => (string[2] y) { y = Constant<value_strings = ["a", "b"]>() }'

    (found,) = run_program(text, {}).values()

    assert found.tolist() == ["a", "b"]
    assert found.dtype == object


def test_float_constants_take_the_program_s_type() -> None:
    model = build("g () => (float[] y) { c = Constant<value_float = 0.5>() y = Identity(c) }")

    assert Program.from_subgraph(model, dtype=torch.bfloat16)({})["y"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["uint16", "uint32", "uint64", "bool", "float16", "int8"])
def test_constant_of_shape_fills_with_every_type(kind: str) -> None:
    text = f"""
      g (int64[2] s) => ({kind}[M, N] y) {{ y = ConstantOfShape<value = {kind}[1] {{1}}>(s) }}
    """

    agrees_with_runtime(text, {"s": np.array([2, 3])}, tolerance=0)


def test_constant_of_shape_fills_with_a_string() -> None:
    text = """
      g (int64[2] s) => (string[M, N] y) { y = ConstantOfShape<value = string[1] {"a"}>(s) }
    """

    (found,) = run_program(text, {"s": np.array([1, 2])}).values()

    assert found.tolist() == [["a", "a"]]


def test_range_counts_large_integers_exactly() -> None:
    text = "g (int64 a, int64 b, int64 d) => (int64[N] y) { y = Range(a, b, d) }"
    start = (1 << 62) + 1

    (found,) = run_program(
        text, {"a": np.array(start), "b": np.array(start - 7), "d": np.array(-3)}
    ).values()

    assert found.tolist() == [start, start - 3, start - 6]


@pytest.mark.parametrize("bounds", [(0.0, 1.0, 0.1), (3.0, 1.0, -0.5), (1.0, 0.0, 1.0)])
def test_range_of_floats(bounds: tuple[float, float, float]) -> None:
    text = "g (float a, float b, float d) => (float[N] y) { y = Range(a, b, d) }"
    feeds = {name: np.array(each, np.float32) for name, each in zip("abd", bounds, strict=True)}

    agrees_with_runtime(text, feeds, tolerance=1e-6)  # ONNX Runtime adds up rather than multiplies


def test_range_has_gradients() -> None:
    text = """
      g (double a, double d) => (double[N] y) {
        b = Constant<value = double {2.0}>()
        y = Range(a, b, d)
      }
    """

    gradients_agree(text, {"a": np.array(0.1), "d": np.array(0.3)})


def test_range_refuses_another_stash_type() -> None:
    text = "g (float16 a, float16 d) => (float16[N] y) { y = Range<stash_type = 10>(a, a, d) }"

    with pytest.raises(ModelError, match="stash_type"):
        run_program(text, {"a": np.float16(0), "d": np.float16(1)}, opset=27)


@pytest.mark.parametrize("diagonal", [-4, -1, 0, 2, 9])
def test_eye_like_has_any_diagonal(diagonal: int) -> None:
    text = f"g (int32[3, 4] x) => (double[3, 4] y) {{ y = EyeLike<dtype = 11, k = {diagonal}>(x) }}"

    agrees_with_runtime(text, {"x": np.zeros((3, 4), np.int32)}, tolerance=0)


@pytest.mark.parametrize("bounds", ["", "<start = 1>", "<end = -1>", "<start = -9, end = 9>"])
def test_shape_of_a_part_of_the_axes(bounds: str) -> None:
    text = f"g (uint16[A, B, C] x) => (int64[N] y, int64 n) {{ y = Shape{bounds}(x) n = Size(x) }}"
    model = build(text)

    found = Program.from_subgraph(model)({"x": np.zeros((2, 3, 5), np.uint16)})

    sizes = {"": [2, 3, 5], "<start = 1>": [3, 5], "<end = -1>": [2, 3]}
    assert found["y"].tolist() == sizes.get(bounds, [2, 3, 5])
    assert found["n"].item() == 30
