import numpy as np
import onnx_ir as ir

from qcompiler.execution.intermediates import shapes_at, values_at
from tests.support.graphs import build, random_array, serialized


def model() -> ir.Model:
    return build(
        """g (float[N, 8] x) => (float[N, 4] y) {
            a = MatMul(x, w)
            s = Shape(a)
            b = Reshape(a, s)
            y = Relu(b)
        }""",
        {"w": random_array(8, 4)},
    )


def test_shapes_of_floats_integers_and_inputs() -> None:
    source = model()
    before = serialized(source)
    found = shapes_at(source, ["x", "a", "s"], {"x": random_array(3, 8)})
    assert found == {"x": (3, 8), "a": (3, 4), "s": (2,)}
    assert serialized(source) == before


def test_values_of_floats_integers_and_inputs() -> None:
    x = random_array(3, 8)
    found = values_at(model(), ["a", "x", "s", "y"], {"x": x})
    expected = x @ random_array(8, 4)
    np.testing.assert_allclose(found["a"], expected, atol=1e-5)
    np.testing.assert_allclose(found["y"], np.maximum(expected, 0), atol=1e-5)
    assert found["s"].tolist() == [3, 4]
    assert found["x"] is x


def test_inputs_alone_need_no_run() -> None:
    broken = build("g (float[2] x) => (float[2] y) { y = NoSuchOp(x) }")
    x = random_array(2)
    assert values_at(broken, ["x"], {"x": x}) == {"x": x}
    assert shapes_at(broken, ["x"], {"x": x}) == {"x": (2,)}
