"""Which channels of a graph can be scaled, what takes the scale up, and why others cannot."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.channels.scaling import scale_group
from qcompiler.ir.editing import value_names
from qcompiler.ir.weights import WeightStore
from qcompiler.rewriting.structure import structural_faults
from tests.support.channel_groups import error_in_double, groups_of, random_scales
from tests.support.graphs import Array, build, random_array
from tests.support.parity import assert_parity

TOLERANCE = 1e-12


@dataclass(frozen=True)
class Case:
    """A graph whose channels can be scaled.

    Attributes:
        text: The graph.
        weights: Shapes of its float initializers, by name.
        taken: For each group: the constants that change, in the order of their names.
        counts: Channels of each group.
        constants: Initializers that are not random.
        feeds: Shapes of its inputs.
    """

    text: str
    weights: Mapping[str, tuple[int, ...]]
    taken: list[list[str]]
    counts: list[int]
    constants: Mapping[str, Array] = field(default_factory=dict)
    feeds: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"x": (2, 5, 8)})

    def all_weights(self) -> dict[str, Array]:
        made = {
            name: random_array(*shape, seed=seed)
            for seed, (name, shape) in enumerate(self.weights.items())
        }
        return {**made, **self.constants}


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


SEQUENCE = "g (float[B, T, 8] x) => (float[B, T, 6] y)"
IMAGE = "g (float[N, 3, 9, 9] x) => (float[N, 4, P, Q] y)"
IMAGE_FEEDS = {"x": (2, 3, 9, 9)}
HEADS = {"four": ints(0, 0, 4, 2), "three": ints(0, 0, 8)}

CASES = {
    "layer-norm": Case(
        SEQUENCE + "{ n = LayerNormalization(x, g, b) y = MatMul(n, w) }",
        {"g": (8,), "b": (8,), "w": (8, 6)},
        [["b", "g", "w"]],
        [8],
    ),
    "layer-norm without a bias, two readers": Case(
        SEQUENCE
        + """{ n = LayerNormalization(x, g) a = MatMul(n, v) z = MatMul(n, w)
               s = Sigmoid(a) y = Mul(s, z) }""",
        {"g": (8,), "v": (8, 6), "w": (8, 6)},
        [["g", "v", "w"]],
        [8],
    ),
    "decomposed norm": Case(
        SEQUENCE
        + """{ q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps) r = Sqrt(e)
               d = Div(x, r) n = Mul(d, g) y = MatMul(n, w) }""",
        {"g": (8,), "w": (8, 6)},
        [["g", "w"]],
        [8],
        {"last": ints(-1), "eps": np.array(1e-5, np.float32)},
    ),
    "linear through Relu": Case(
        SEQUENCE + "{ h = MatMul(x, v) a = Add(h, b) r = Relu(a) y = MatMul(r, w) }",
        {"v": (8, 5), "b": (5,), "w": (5, 6)},
        [["b", "v", "w"]],
        [5],
    ),
    "Gemm with transposed weights": Case(
        """g (float[N, 8] x) => (float[N, 6] y)
           { h = Gemm<transB=1>(x, v, b) r = LeakyRelu<alpha=0.1>(h)
             y = Gemm<transB=1, alpha=0.5, beta=2.0>(r, w, c) }""",
        {"v": (5, 8), "b": (5,), "w": (6, 5), "c": (6,)},
        [["b", "v", "w"]],
        [5],
        feeds={"x": (4, 8)},
    ),
    "gate": Case(
        SEQUENCE
        + """{ a = MatMul(x, v) s = Sigmoid(a) i = Mul(a, s) u = MatMul(x, t) m = Mul(i, u)
               y = MatMul(m, w) }""",
        {"v": (8, 7), "t": (8, 7), "w": (7, 6)},
        [["t", "w"]],
        [7],
    ),
    "values of attention": Case(
        SEQUENCE
        + """{ v0 = MatMul(x, v) v1 = Add(v0, b) v2 = Reshape(v1, four)
               v3 = Transpose<perm=[0, 2, 1, 3]>(v2)
               k0 = Reshape(x, four) k1 = Transpose<perm=[0, 2, 3, 1]>(k0)
               q1 = Transpose<perm=[0, 2, 1, 3]>(k0) a = MatMul(q1, k1) p = Softmax(a)
               o = MatMul(p, v3) o1 = Transpose<perm=[0, 2, 1, 3]>(o) o2 = Reshape(o1, three)
               y = MatMul(o2, w) }""",
        {"v": (8, 8), "b": (8,), "w": (8, 6)},
        [["b", "v", "w"]],
        [8],
        HEADS,
    ),
    "values shared by query heads": Case(
        """g (float[B, T, 8] x, float[B, 4, T, T] p) => (float[B, T, 6] y)
           { v0 = MatMul(x, v) v1 = Reshape(v0, two_heads) v2 = Transpose<perm=[0, 2, 1, 3]>(v1)
             v3 = Unsqueeze(v2, axis2) v4 = Expand(v3, twice) v5 = Reshape(v4, four_heads)
             o = MatMul(p, v5) o1 = Transpose<perm=[0, 2, 1, 3]>(o) o2 = Reshape(o1, three)
             y = MatMul(o2, w) }""",
        {"v": (8, 4), "w": (8, 6)},
        [["v", "w"]],
        [4],
        {
            "two_heads": ints(0, 0, 2, 2),
            "axis2": ints(2),
            "twice": ints(1, 1, 2, 1, 1),
            "four_heads": ints(0, 4, -1, 2),
            "three": ints(0, 0, 8),
        },
        {"x": (2, 5, 8), "p": (2, 4, 5, 5)},
    ),
    "convolutions": Case(
        IMAGE
        + "{ a = Conv(x, v, b) r = Relu(a) p = MaxPool<kernel_shape=[2, 2]>(r) y = Conv(p, w) }",
        {"v": (6, 3, 3, 3), "b": (6,), "w": (4, 6, 3, 3)},
        [["b", "v", "w"]],
        [6],
        feeds=IMAGE_FEEDS,
    ),
    "grouped and depthwise": Case(
        IMAGE
        + """{ a = Conv<group=3>(x, v) r = Relu(a) d = Conv<group=6>(r, u, b) e = Relu(d)
               y = Conv<group=2>(e, w) }""",
        {"v": (6, 1, 3, 3), "u": (6, 1, 3, 3), "b": (6,), "w": (4, 3, 1, 1)},
        [["u", "v"], ["b", "u", "w"]],
        [6, 6],
        feeds=IMAGE_FEEDS,
    ),
    "transposed convolution": Case(
        IMAGE + "{ c = Conv(x, u) a = ConvTranspose(c, v, b) r = Relu(a) y = Conv(r, w) }",
        {"v": (4, 6, 2, 2), "b": (6,), "w": (4, 6, 1, 1), "u": (4, 3, 1, 1)},
        [["u", "v"], ["b", "v", "w"]],
        [4, 6],
        feeds=IMAGE_FEEDS,
    ),
    "residual stream": Case(
        IMAGE
        + """{ a = Conv(x, v) r = Relu(a) c = Conv<pads=[1, 1, 1, 1]>(r, u, b) s = Add(c, r)
               t = Relu(s) y = Conv(t, w) }""",
        {"v": (6, 3, 1, 1), "u": (6, 6, 3, 3), "b": (6,), "w": (4, 6, 1, 1)},
        [["b", "u", "u", "v", "w"]],
        [6],
        feeds=IMAGE_FEEDS,
    ),
    "flattened images": Case(
        """g (float[N, 3, 6, 6] x) => (float[N, 6] y)
           { a = Conv(x, v) r = Relu(a) p = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>(r)
             f = Flatten(p) y = Gemm(f, w) }""",
        {"v": (5, 3, 3, 3), "w": (20, 6)},
        [["v", "w"]],
        [5],
        feeds={"x": (2, 3, 6, 6)},
    ),
    "pooled over positions": Case(
        """g (float[N, 3, 6, 6] x) => (float[N, 6] y)
           { a = Conv(x, v) p = GlobalAveragePool(a) s = Squeeze(p, axes) y = MatMul(s, w) }""",
        {"v": (5, 3, 3, 3), "w": (5, 6)},
        [["v", "w"]],
        [5],
        {"axes": ints(2, 3)},
        {"x": (2, 3, 6, 6)},
    ),
    "joined channels": Case(
        SEQUENCE
        + "{ a = MatMul(x, v) b = MatMul(x, u) c = Concat<axis=-1>(a, b) y = MatMul(c, w) }",
        {"v": (8, 3), "u": (8, 4), "w": (7, 6)},
        [["u", "v", "w"]],
        [7],
    ),
    "split channels": Case(
        SEQUENCE
        + """{ a = MatMul(x, v) b, c = Split<axis=-1>(a, sizes) s = Sigmoid(b) m = Mul(s, c)
               y = MatMul(m, w) }""",
        {"v": (8, 10), "w": (5, 6)},
        [["v", "w"]],
        [5],
        {"sizes": ints(5, 5)},
    ),
    "sliced channels": Case(
        SEQUENCE
        + """{ a = MatMul(x, v) b = Slice(a, zero, five, last) c = Slice(a, five, end, last)
               s = Tanh(b) m = Mul(c, s) y = MatMul(m, w) }""",
        {"v": (8, 10), "w": (5, 6)},
        [["v", "w"]],
        [5],
        {"zero": ints(0), "five": ints(5), "end": ints(2**31), "last": ints(-1)},
    ),
    "reversed channels": Case(
        SEQUENCE + "{ a = MatMul(x, v) b = Slice(a, first, stop, last, step) y = MatMul(b, w) }",
        {"v": (8, 5), "w": (5, 6)},
        [["v", "w"]],
        [5],
        {"first": ints(-1), "stop": ints(-99), "last": ints(2), "step": ints(-1)},
    ),
    "lookup": Case(
        "g (int64[B, T] x) => (float[B, T, 6] y) { e = Gather(table, x) y = MatMul(e, w) }",
        {"table": (9, 8), "w": (8, 6)},
        [["table", "w"]],
        [8],
        feeds={},
    ),
    "weight on the left": Case(
        "g (float[8, 5] x) => (float[6, 5] y) { a = MatMul(v, x) b = Relu(a) y = MatMul(w, b) }",
        {"v": (7, 8), "w": (6, 7)},
        [["v", "w"]],
        [7],
        feeds={"x": (8, 5)},
    ),
    "constant operands": Case(
        SEQUENCE
        + """{ a = MatMul(x, v) b = Add(a, two) c = Max(b, zero) d = Mul(c, half) e = Sub(d, s)
               y = MatMul(e, w) }""",
        {"v": (8, 5), "s": (5,), "w": (5, 6)},
        [["s", "two", "v", "w"]],
        [5],
        {
            "two": np.array(2, np.float32),
            "zero": np.array(0, np.float32),
            "half": np.array(0.5, np.float32),
        },
    ),
    "padded and averaged over positions": Case(
        """g (float[B, T, 8] x) => (float[B, 6] y)
           { a = MatMul(x, v) p = Pad(a, pads) m = ReduceMean<keepdims=0>(p, axis)
             y = MatMul(m, w) }""",
        {"v": (8, 5), "w": (5, 6)},
        [["v", "w"]],
        [5],
        {"pads": ints(0, 1, 0, 0, 2, 0), "axis": ints(1)},
    ),
}


def feeds_of(case: Case) -> dict[str, Array]:
    if not case.feeds:
        return {"x": np.array([[1, 4, 8], [0, 3, 3]], np.int64)}
    return {name: random_array(*shape, seed=99) for name, shape in case.feeds.items()}


@pytest.mark.parametrize("name", CASES)
def test_scaling_changes_nothing_in_double_precision(name: str) -> None:
    case = CASES[name]
    error = error_in_double(case.text, case.all_weights(), feeds_of(case))
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_constants_that_take_a_scale_up(name: str) -> None:
    case = CASES[name]
    groups, _ = groups_of(build(case.text, case.all_weights()))
    taken = [sorted(factor.value.name or "" for factor in group.factors) for group in groups]
    assert taken == case.taken
    assert [group.count for group in groups] == case.counts


def test_the_check_in_double_precision_can_fail() -> None:
    text = SEQUENCE + "{ h = MatMul(x, v) a = Sigmoid(h) y = MatMul(a, w) }"
    weights = {"v": random_array(8, 5), "w": random_array(5, 6)}
    groups, refusals = groups_of(build(text, weights))
    assert not groups
    assert [refusal.data.name for refusal in refusals] == ["x", "a"]
    broken = dict(weights, v=weights["v"] * 2)
    feeds = {"x": random_array(2, 5, 8)}
    assert error_in_double(text, weights, feeds) == 0
    assert not np.allclose(weights["v"], broken["v"])


REFUSED: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "a graph input": (
        SEQUENCE + "{ y = MatMul(x, w) }",
        {"w": (8, 6)},
        "x is an input of the model or of a body",
    ),
    "an output": (
        "g (float[B, T, 8] x) => (float[B, T, 6] y, float[B, T, 5] h)"
        "{ h = MatMul(x, v) y = MatMul(h, w) }",
        {"v": (8, 5), "w": (5, 6)},
        "h is an output of the model or of a body",
    ),
    "an activation": (
        SEQUENCE + "{ h = MatMul(x, v) [act] a = Gelu(h) y = MatMul(a, w) }",
        {"v": (8, 5), "w": (5, 6)},
        "act (Gelu) computes a: Gelu does not commute with a scale",
    ),
    "a norm that reads the stream": (
        SEQUENCE
        + """{ h = MatMul(x, v) [ln] n = LayerNormalization(h, g) s = MatMul(n, u) t = Add(h, s)
               y = MatMul(t, w) }""",
        {"v": (8, 5), "g": (5,), "u": (5, 5), "w": (5, 6)},
        "ln (LayerNormalization) reads h: a norm mixes the channels of what it reads",
    ),
    "a Relu6": (
        SEQUENCE + "{ h = MatMul(x, v) [six] a = Clip(h, low, high) y = MatMul(a, w) }",
        {"v": (8, 5), "w": (5, 6)},
        "six (Clip) computes a: it cuts at 6, which would be another bound in each channel; exact "
        "is only a Clip at 0, that is a Relu",
    ),
    "a square": (
        SEQUENCE + "{ h = MatMul(x, v) [sq] a = Mul(h, h) y = MatMul(a, w) }",
        {"v": (8, 5), "w": (5, 6)},
        "sq (Mul) reads h: it multiplies the value by itself",
    ),
    "a padding that is not 0": (
        SEQUENCE + "{ h = MatMul(x, v) [pad] a = Pad(h, pads, six) y = MatMul(a, w) }",
        {"v": (8, 6), "w": (6, 6)},
        "pad (Pad) computes a: it pads with a number that is not 0",
    ),
}
_CONSTANTS = {
    "low": np.array(0, np.float32),
    "high": np.array(6, np.float32),
    "six": np.array(6, np.float32),
    "pads": ints(0, 1, 0, 0, 2, 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    text, shapes, reason = REFUSED[name]
    weights = {key: random_array(*shape) for key, shape in shapes.items()}
    weights |= {key: values for key, values in _CONSTANTS.items() if f" {key}" in text}
    groups, refusals = groups_of(build(text, weights))
    assert refusals[-1].reason == reason
    assert all(refusals[-1].data not in group.values for group in groups)


def test_a_stream_of_which_one_reader_cannot_be_scaled_is_left_alone() -> None:
    text = (
        IMAGE
        + """{ a = Conv(x, v) r = Relu(a) c = Conv<pads=[1, 1, 1, 1]>(r, u) s = Add(c, r)
               [sig] t = Sigmoid(s) z = Conv(s, w) q = Conv(t, w2) y = Add(z, q) }"""
    )
    weights = {
        "v": random_array(6, 3, 1, 1),
        "u": random_array(6, 6, 3, 3),
        "w": random_array(4, 6, 1, 1),
        "w2": random_array(4, 6, 1, 1),
    }
    groups, refusals = groups_of(build(text, weights))
    assert not groups
    reason = "sig (Sigmoid) reads s: Sigmoid does not commute with a scale"
    assert [refusal.reason for refusal in refusals].count(reason) == 2


def test_one_fixed_channel_leaves_the_others_free() -> None:
    text = (
        "g (float[B, T, 8] x) => (float[B, T, 6] y, float[B, T, 2] z)"
        "{ h = MatMul(x, v) z = Slice(h, zero, two, last) y = MatMul(h, w) }"
    )
    weights = {
        "v": random_array(8, 5),
        "w": random_array(5, 6),
        "zero": ints(0),
        "two": ints(2),
        "last": ints(-1),
    }
    groups, _ = groups_of(build(text, weights))
    assert [group.count for group in groups] == [3]
    assert groups[0].readers[0].channels.tolist() == [-1, -1, 0, 1, 2]
    assert groups[0].reasons == ("z is an output of the model or of a body",)
    assert error_in_double(text, weights, {"x": random_array(2, 3, 8)}) <= TOLERANCE


def test_a_weight_that_another_op_reads_is_not_copied_if_it_is_large() -> None:
    text = (
        SEQUENCE
        + "{ n = LayerNormalization(x, g) a = MatMul(n, w) [other] y = MatMul(x, w) z = Neg(a) }"
    )
    weights = {"g": random_array(8), "w": random_array(8, 6)}
    model = build(text, weights)
    groups, _ = groups_of(model)
    assert [group.count for group in groups] == [8]  # 192 bytes are copied
    large = {"g": random_array(8), "w": random_array(8, 4096)}
    _, refusals = groups_of(build(text.replace("T, 6]", "T, 4096]"), large))
    reason = "its weight w is read by other (MatMul) too, and a copy would take 131,072 bytes more"
    assert reason in [refusal.reason for refusal in refusals]


def test_ops_that_share_weight_and_data_are_scaled_together() -> None:
    text = (
        SEQUENCE
        + "{ n = LayerNormalization(x, g) a = MatMul(n, w) b = MatMul(n, w) y = Add(a, b) }"
    )
    weights = {"g": random_array(8), "w": random_array(8, 6)}
    groups, _ = groups_of(build(text, weights))
    assert [len(group.readers) for group in groups] == [2]
    assert error_in_double(text, weights, {"x": random_array(2, 3, 8)}) <= TOLERANCE


def test_bodies_are_left_alone() -> None:
    text = """g (float[B, T, 8] x, bool c) => (float[B, T, 6] y) {
        n = LayerNormalization(x, g)
        y = If (c) <then_branch = t () => (float[B, T, 6] p) { p = MatMul(n, w) },
                    else_branch = e () => (float[B, T, 6] q) { m = Sigmoid(n) q = MatMul(m, w) }>
    }"""
    model: ir.Model = build(text, {"g": random_array(8), "w": random_array(8, 6)})
    groups, refusals = groups_of(model)
    assert not groups
    assert any("Sigmoid does not commute with a scale" in r.reason for r in refusals)


SHARED = {
    "read and written by one op, read by another": (
        IMAGE.replace("3, 9", "4, 9").replace("[N, 3", "[N, 4")
        + "{ a = Conv(x, u) r = Relu(a) b = Conv(r, u) y = Conv(b, u) }",
        {"u": (4, 4, 1, 1)},
    ),
    "a producer and its readers": (
        "g (float[N, 8, 5, 5] x) => (float[N, 16, 5, 5] y, float[N, 16, 5, 5] z)"
        "{ a = Conv(x, w) s, t = Split<axis=1, num_outputs=2>(a) y = Conv(s, w) z = Conv(t, w) }",
        {"w": (16, 8, 1, 1)},
    ),
    "a residual branch": (
        "g (float[N, 4, 5, 5] x) => (float[N, 4, 5, 5] y)"
        "{ a = Conv(x, v) b = Relu(a) c = Conv(b, w) d = Add(c, b) m = Relu(d) y = Conv(m, w) }",
        {"v": (4, 4, 1, 1), "w": (4, 4, 1, 1)},
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_small_weights_that_ops_share_are_copied_for_each_demand(name: str, tmp_path: Path) -> None:
    text, shapes = SHARED[name]
    weights = {key: random_array(*shape, seed=3) for key, shape in shapes.items()}
    after = build(text, weights)
    groups, _ = groups_of(after)
    assert groups
    taken = value_names(after)
    with WeightStore(tmp_path) as store:
        for seed, group in enumerate(groups):
            scale_group(group, random_scales(group, seed), store, taken, "test")
        assert list(structural_faults(after)) == []
        assert_parity(build(text, weights), after, tolerance=1e-4)
