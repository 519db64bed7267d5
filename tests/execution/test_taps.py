"""What taps return, against a plain run of a graph that returns everything."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.errors import ModelError
from qcompiler.execution.sessions import open_session
from qcompiler.execution.taps import Measure, Tap, tap_model
from tests.support.graphs import build, op_types, random_array, serialized

Array = npt.NDArray[Any]

TEXT = """g (float[b, 4] x) => (float[b, 3] y, float[b, 3] z) {
    h = MatMul(x, w)
    r = Relu(h)
    y = Add(r, c)
    s = Sigmoid(y)
    z = Neg(s) }"""
REDUCTIONS: dict[Measure, Any] = {
    Measure.MINIMUM: np.min,
    Measure.MAXIMUM: np.max,
    Measure.SUM: np.sum,
    Measure.SUM_SQUARES: lambda a, axis=None: np.sum(a * a, axis=axis),
}


def chain(opset: int = 21) -> ir.Model:
    return build(TEXT, {"w": random_array(4, 3), "c": random_array(3, seed=1)}, opset=opset)


def run(model: ir.Model, taps: list[Tap], feeds: dict[str, Array]) -> dict[Tap, Array]:
    tapped = tap_model(model, taps)
    with open_session(tapped.model, optimize=False, threads=1) as session:
        outputs = session.run(feeds)
    return {tap: outputs[name] for tap, name in tapped.outputs.items()}


def plain(model: ir.Model, names: list[str], feeds: dict[str, Array]) -> dict[str, Array]:
    copy = model.clone()
    made = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(made[name] for name in names)
    with open_session(copy, optimize=False, threads=1) as session:
        return session.run(feeds)


@pytest.mark.parametrize("opset", [9, 12, 13, 17, 18, 21])
def test_taps_are_what_a_plain_run_gives(opset: int) -> None:
    names, feeds = ["h", "r", "y", "s", "z"], {"x": random_array(5, 4, seed=2)}
    expected = plain(chain(opset), names, feeds)
    taps = [Tap(name, measure) for name in names for measure in Measure]
    taps += [Tap(name, measure, (0,)) for name in names for measure in REDUCTIONS]
    for tap, found in run(chain(opset), taps, feeds).items():
        values = expected[tap.value]
        if tap.measure is Measure.VALUES:
            np.testing.assert_array_equal(found, values)
        elif tap.measure is Measure.SHAPE:
            assert found.tolist() == [5, 3]
        else:
            exact = tap.measure in (Measure.MINIMUM, Measure.MAXIMUM)
            axis = None if tap.axes is None else tap.axes[0]
            wanted = REDUCTIONS[tap.measure](values, axis=axis)
            np.testing.assert_allclose(
                found, wanted, rtol=0 if exact else 1e-5, atol=1e-6 * (not exact)
            )
            assert found.shape == (() if tap.axes is None else (3,))


def test_inputs_and_weights_can_be_tapped() -> None:
    feeds = {"x": random_array(5, 4, seed=2)}
    taps = [Tap("x", Measure.VALUES), Tap("x", Measure.MAXIMUM), Tap("c", Measure.VALUES)]
    found = run(chain(), taps, feeds)
    np.testing.assert_array_equal(found[taps[0]], feeds["x"])
    assert found[taps[1]] == feeds["x"].max()
    np.testing.assert_array_equal(found[taps[2]], random_array(3, seed=1))


def test_only_what_is_needed_is_kept_and_the_model_stays() -> None:
    model = chain()
    before = serialized(model)
    tapped = tap_model(model, [Tap("r", Measure.VALUES), Tap("r", Measure.VALUES)])
    assert op_types(tapped.model) == ["MatMul", "Relu"]
    assert list(tapped.model.graph.initializers) == ["w"]
    assert [value.name for value in tapped.model.graph.inputs] == ["x"]
    assert [value.name for value in tapped.model.graph.outputs] == ["r"]
    weight = tapped.model.graph.initializers["w"].const_value
    assert weight is model.graph.initializers["w"].const_value
    assert serialized(model) == before
    assert all(use.node.graph is model.graph for v in model.graph.inputs for use in v.uses())


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "DOUBLE"])
def test_other_float_types_come_out_as_float32(kind: str) -> None:
    cast = f"y = Cast<to={ir.DataType[kind].value}>(x)"
    text = f"g (float[b, 4] x) => ({kind.lower()}[b, 4] y) {{ {cast} }}"
    x = random_array(3, 4)
    found = run(build(text), [Tap("y", Measure.VALUES), Tap("y", Measure.MINIMUM)], {"x": x})
    values, low = found.values()
    assert values.dtype == low.dtype == np.float32
    np.testing.assert_allclose(values, x, rtol=2.0**-7)
    assert low == values.min()


@pytest.mark.parametrize("opset", [9, 13, 18, 21])
@pytest.mark.parametrize("axes", [None, (0,), (0, 1)])
def test_empty_tensors_are_reduced(axes: tuple[int, ...] | None, opset: int) -> None:
    taps = [Tap(name, measure, axes) for name in ("x", "h") for measure in REDUCTIONS]
    taps += [Tap(name, Measure.VALUES) for name in ("x", "h")]
    taps += [Tap(name, Measure.SHAPE) for name in ("x", "h")]
    found = run(chain(opset), taps, {"x": np.zeros((0, 4), np.float32)})
    assert found[Tap("h", Measure.VALUES)].shape == (0, 3)
    assert found[Tap("h", Measure.SHAPE)].tolist() == [0, 3]


def test_a_name_that_a_tap_would_take_is_left_alone() -> None:
    text = 'g (float[b] x) => (float[b] "x:minimum") { "x:minimum" = Neg(x) }'
    model = build(text.replace('"x:minimum"', "m"))
    next(iter(model.graph)).outputs[0].name = "x:minimum"
    taps = [Tap("x", Measure.MINIMUM), Tap("x:minimum", Measure.VALUES)]
    found = run(model, taps, {"x": np.array([1, 2], np.float32)})
    assert found[taps[0]] == 1
    assert found[taps[1]].tolist() == [-1, -2]


BODIES = """g (bool c, float[2] x) => (float[2] y) {
    a = Abs(x)
    y = If (c) <
        then_branch = yes () => (float[2] t) { u = Add(a, x) t = Neg(u) },
        else_branch = no () => (float[2] e) { e = Neg(x) }
    > }"""


def test_what_bodies_capture_is_kept() -> None:
    feeds = {"c": np.array(True), "x": np.array([1, -2], np.float32)}
    taps = [Tap("a", Measure.MAXIMUM), Tap("y", Measure.VALUES)]
    found = run(build(BODIES), taps, feeds)
    assert found[taps[0]] == 2
    assert found[taps[1]].tolist() == [-2, 0]


@pytest.mark.parametrize("name", ["u", "t", "e"])
def test_values_in_bodies_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"body '(yes|no)' of an If, Loop or Scan") as caught:
        tap_model(build(BODIES), [Tap(name, Measure.VALUES)])
    assert caught.value.where == name


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="no such value") as caught:
        tap_model(chain(), [Tap("hh", Measure.VALUES)])
    assert caught.value.hint == "nearest: h"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("g (int64[b] n) => (int64[b] m) { m = Neg(n) }", "n"),
        ("g (float[b] x) => (bool[b] m) { m = IsNaN(x) }", "m"),
        ("g (seq(float[2]) q) => (int64 m) { m = SequenceLength(q) }", "q"),
    ],
)
def test_what_is_no_float_tensor_is_refused(text: str, name: str) -> None:
    with pytest.raises(ModelError, match=r"only (float values|tensors) have statistics") as caught:
        tap_model(build(text), [Tap(name, Measure.MINIMUM)])
    assert caught.value.where == name


def test_a_model_without_standard_operators_can_be_tapped() -> None:
    text = """<ir_version: 10, opset_import: ["com.microsoft" : 1]>
        g (float[b, 4] x) => (float[b, 4] y) { y = com.microsoft.Gelu(x) }"""
    tap = Tap("y", Measure.MAXIMUM, (0,))
    assert run(build(text), [tap], {"x": random_array(2, 4)})[tap].shape == (4,)
