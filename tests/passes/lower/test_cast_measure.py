"""Extremes of float values on samples, those in bodies included."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.ir.shapes import infer_shapes
from qcompiler.passes.lower.cast_measure import Extremes, measure_extremes
from tests.support.graphs import build, serialized


def x(*numbers: float) -> Feeds:
    return {"x": np.array(numbers, np.float32)}


def measured(model: ir.Model, *calls: Feeds) -> dict[str, Extremes]:
    def read() -> Iterator[Feeds]:
        yield from calls

    infer_shapes(model)
    before = serialized(model)
    found = measure_extremes(model, Samples("test", False, len(calls), read), lambda _: None)
    assert serialized(model) == before
    return found


def test_extremes_over_all_calls() -> None:
    model = build("g (float[N] x) => (float[N] y) { a = Neg(x) y = Relu(a) }")
    found = measured(model, x(1, -7), x(3, 2))
    assert found == {"x": Extremes(-7, 3), "a": Extremes(-3, 7), "y": Extremes(0, 7)}


def test_extremes_of_what_is_finite_beside_infinities() -> None:
    model = build("g (float[N] x) => (float[N] y) { a = Log(x) y = Sub(a, a) }")
    found = measured(model, x(0, 1, np.e**3), x(-1))
    assert np.isclose(found["a"].high, 3)
    assert (found["a"].low, found["a"].nan, found["a"].infinite) == (0, True, True)
    assert (found["y"].nan, found["y"].infinite) == (True, False)


def test_large_numbers_are_not_taken_for_infinities() -> None:
    model = build("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    found = measured(model, {"x": np.array([3e38, -1], np.float32)})
    assert found["y"] == Extremes(-float(np.float32(3e38)), 1)


def test_empty_tensors_hold_nothing() -> None:
    model = build("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    assert measured(model, {"x": np.zeros(0, np.float32)})["y"] == Extremes()


LOOP = """g (int64 n, bool c, float[2] x) => (float[2] y) {
    keep = Constant<value = bool {1}>()
    s = Loop (n, keep, x) <body = body
        (int64 i, bool go, float[2] h) => (bool again, float[2] next) {
        again = Identity(go) twice = Add(h, h)
        next = If (c) <
            then_branch = t () => (float[2] o1) { e = Exp(twice) o1 = Neg(e) },
            else_branch = e () => (float[2] o2) { o2 = Identity(twice) } > } >
    y = Relu(s) }"""


def test_values_in_nested_bodies() -> None:
    def feeds(n: int, c: bool) -> Feeds:
        return {"n": np.array(n), "c": np.array(c), "x": np.array([1, 2], np.float32)}

    plain = measured(build(LOOP), feeds(3, c=False))
    assert plain["twice"] == Extremes(0, 16)
    assert plain["o2"] == Extremes(0, 16)
    assert plain["e"] == Extremes()
    both = measured(build(LOOP), feeds(3, c=False), feeds(1, c=True))
    assert np.isclose(both["e"].high, np.exp(4))
    assert np.isclose(both["o1"].low, -np.exp(4))
    assert measured(build(LOOP), feeds(0, c=True))["twice"] == Extremes()


def test_infinities_in_bodies() -> None:
    feeds = {"n": np.array(2), "c": np.array(True), "x": np.array([100, 1], np.float32)}
    found = measured(build(LOOP), feeds)
    assert found["e"].infinite
    assert not found["e"].nan
    assert found["twice"].infinite


def test_bfloat16_is_rounded_where_it_is_stored() -> None:
    model = build("g (bfloat16[N] x) => (bfloat16[N] y) { y = Add(x, x) }")
    found = measured(model, {"x": np.array([2e38, 1.001], np.float32)})
    assert found["y"].infinite
    assert found["y"].high == 2.0
