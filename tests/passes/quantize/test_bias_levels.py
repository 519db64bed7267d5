"""Running a model level by level gives what running it as a whole gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.intermediates import values_at
from qcompiler.passes.quantize.bias_levels import LevelledModel, Shift, levels_of
from qcompiler.passes.quantize.bias_shelf import Shelf
from qcompiler.rewriting.structure import structural_faults
from tests.support.graphs import build, externalize, random_array, serialized

TEXT = """g (float[n, 8] x, int64 k) => (float[n, 8] y, float[n, 8] left) {
    one = Constant<value_float=1.0>()
    scale = Add(s, one)
    size = Shape(x)
    [first] a = MatMul(x, w)
    h = Mul(a, scale)
    [left] left = MatMul(h, w)
    [right] r = MatMul(h, v)
    i = Reshape(r, size)
    j = Sum(left, i, a)
    [last] y = MatMul(j, v) }"""
WEIGHTS = {"w": random_array(8, 8, seed=1), "v": random_array(8, 8, seed=2), "s": random_array(8)}
FEEDS = [{"x": random_array(4 + n, 8, seed=n), "k": np.array(n)} for n in range(3)]
LEVELS = [["a"], ["left", "r"], ["y"], ["y", "left"]]


@contextmanager
def levelled(model: ir.Model, folder: Path, room: int = 1 << 20) -> Iterator[LevelledModel]:
    with Shelf(folder, room) as shelf:
        for call, feeds in enumerate(FEEDS):
            for name, values in feeds.items():
                shelf.put(name, call, values)
        yield LevelledModel(model, LEVELS, shelf, len(FEEDS), label="it", threads=1)


def by_name(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for node in model.graph for value in node.outputs}


def test_levels_depend_on_earlier_ones_alone() -> None:
    model = build(TEXT, WEIGHTS)
    values = by_name(model)
    levels = levels_of(model.graph, [values[name] for name in ("y", "r", "left", "a")])
    assert [[value.name for value in level] for level in levels] == [["a"], ["left", "r"], ["y"]]


@pytest.mark.parametrize("room", [1 << 20, 0], ids=["memory", "files"])
@pytest.mark.parametrize("external", [False, True])
def test_levels_give_what_the_whole_gives(external: bool, room: int, tmp_path: Path) -> None:
    model = build(TEXT, WEIGHTS)
    before = serialized(model)
    source = externalize(model, tmp_path) if external else model
    files = set(tmp_path.iterdir())
    with levelled(source, tmp_path, room) as it:
        assert it.obstacle is None
        for index, names in enumerate(LEVELS):
            with it.level(index, keep=False) as run:
                trial = [run(call) for call in (2, 0, 0)]
            with it.level(index) as run:
                found = [run(call) for call in range(len(FEEDS))]
            for feeds, values in zip(FEEDS, found, strict=True):
                wanted = values_at(model, names, feeds)
                assert values.keys() == set(names)
                assert all((values[name] == wanted[name]).all() for name in names)
            assert (trial[0][names[0]] == found[2][names[0]]).all()
    assert serialized(model) == before
    assert list(structural_faults(model)) == []
    assert set(tmp_path.iterdir()) == files


def test_a_shift_acts_on_all_that_comes_later(tmp_path: Path) -> None:
    model = build(TEXT, WEIGHTS)
    number = random_array(8, seed=5).astype(np.float64)
    with levelled(model, tmp_path) as it:
        with it.level(0) as run:
            first = [run(call)["a"] for call in range(3)]
        with it.level(1, keep=False) as run:
            with it.shifted(0, {"a": Shift(-1, number)}):
                shifted = run(1)["left"]
            plain = run(1)["left"]
            it.shift(0, {"a": Shift(-1, number)})
            assert (run(1)["left"] == shifted).all()
    scale = WEIGHTS["s"] + 1
    assert np.allclose(plain, (first[1] * scale) @ WEIGHTS["w"], atol=1e-5)
    assert np.allclose(shifted - plain, (number * scale) @ WEIGHTS["w"], atol=1e-4)


def test_what_is_rounded_at_an_output_is_seen_before(tmp_path: Path) -> None:
    text = """g (float[n, 8] x) => (float[n, 8] y) {
        a = MatMul(x, w)
        q = QuantizeLinear(a, t, z)
        y = DequantizeLinear(q, t, z) }"""
    step, zero = np.array(0.5, np.float32), np.array(0, np.int8)
    model = build(text, {"w": WEIGHTS["w"], "t": step, "z": zero})
    with Shelf(tmp_path, 1 << 20) as shelf:
        shelf.put("x", 0, FEEDS[0]["x"])
        it = LevelledModel(model, [["y"]], shelf, 1, label="it", threads=1)
        with it.level(0) as run:
            found = run(0)["y"]
    assert (found == values_at(model, ["a"], {"x": FEEDS[0]["x"]})["a"]).all()


def test_a_sequence_between_levels_is_an_obstacle(tmp_path: Path) -> None:
    text = """g (float[n, 8] x) => (float[n, 8] y) {
        a = MatMul(x, w)
        s = SequenceConstruct(x, a)
        zero = Constant<value_int=0>()
        b = SequenceAt(s, zero)
        c = MatMul(b, w)
        d = SequenceAt(s, zero)
        e = Add(c, d)
        y = MatMul(e, v) }"""
    model = build(text, {name: WEIGHTS[name] for name in ("w", "v")})
    with Shelf(tmp_path, 1 << 20) as shelf:
        assert LevelledModel(model, [["c"], ["y"]], shelf, 0, label="i", threads=1).obstacle == "s"
