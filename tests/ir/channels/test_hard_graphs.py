"""Graphs on which following channels once went wrong: scaled at random, they compute the same."""

from pathlib import Path

import numpy as np
import pytest

from qcompiler.ir.channels.groups import ChannelGroup, group_behind_mul
from qcompiler.ir.channels.scaling import scale_group
from qcompiler.ir.editing import value_names
from qcompiler.ir.weights import WeightStore
from qcompiler.rewriting.structure import structural_faults
from tests.support.channel_groups import groups_of, random_scales
from tests.support.graphs import Array, build, random_array
from tests.support.parity import assert_parity

S = "g (float[B, T, 8] x) => (float[B, T, 6] y) "
Z = "g (float[B, T, 8] x) => (float[B, T, 8] y, float[B, T, 8] z) "
TWO = {"two": np.array(2, np.float32)}
ONES = {"zero": np.array([0]), "one": np.array([1]), "last": np.array([-1])}

GRAPHS: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, Array]]] = {
    "what Sign returns": (
        S + "{ h = MatMul(x, v) s = Sign(h) y = MatMul(s, w) }",
        {"v": (8, 5), "w": (5, 6)},
        {},
    ),
    "one weight before and behind": (
        "g (float[B, T, 8] x) => (float[B, T, 8] y) "
        "{ h = MatMul(x, u) r = Relu(h) y = MatMul(r, u) }",
        {"u": (8, 8)},
        {},
    ),
    "a vector added and multiplied": (
        S + "{ h = MatMul(x, v) a = Add(h, c) d = Relu(a) e = Mul(d, c) f = MatMul(d, w) "
        "k = MatMul(e, t) y = Add(f, k) }",
        {"v": (8, 5), "c": (5,), "w": (5, 6), "t": (5, 6)},
        {},
    ),
    "two groups after another copy a weight": (
        "g (float[B, T, 8] x) => (float[B, T, 6] y, float[B, T, 8] z)"
        "{ h = MatMul(x, v) r = Relu(h) k = MatMul(r, u) q = Relu(k) y = MatMul(q, w) "
        "z = MatMul(x, u) }",
        {"v": (8, 8), "u": (8, 8), "w": (8, 6)},
        {},
    ),
    "a scalar for channels of two kinds": (
        S
        + "{ q = Mul(x, two) a0 = MatMul(q, v) a = Add(a0, two) b0 = MatMul(q, u) b = Add(b0, two) "
        "c = Concat<axis=-1>(a, b) y = MatMul(c, w) }",
        {"v": (8, 5), "u": (8, 7), "w": (12, 6)},
        TWO,
    ),
    "a scalar for one channel": (
        S + "{ a = MatMul(x, v) b = Add(a, two) y = MatMul(b, w) }",
        {"v": (8, 1), "w": (1, 6)},
        TWO,
    ),
    "a transposed weight that is shown": (
        "g (float[B, T, 8] x) => (float[B, T, 6] y, float[8, 6] wt)"
        "{ n = LayerNormalization(x, g) wt = Transpose(w) y = MatMul(n, wt) }",
        {"g": (8,), "w": (6, 8)},
        {},
    ),
    "a weight read both ways and elsewhere": (
        Z + "{ n = LayerNormalization(x, g) ut = Transpose(u) a = MatMul(n, u) b = MatMul(n, ut) "
        "y = Add(a, b) z = MatMul(x, u) }",
        {"g": (8,), "u": (8, 8)},
        {},
    ),
    "a batch of left weights and a vector": (
        "g (float[7] x) => (float[6, 5] y) { h = MatMul(t, x) r = Relu(h) y = MatMul(v, r) }",
        {"t": (5, 5, 7), "v": (6, 5)},
        {},
    ),
    "one channel of several": (
        "g (float[N, 3, 9, 9] x) => (float[N, 6, 9, 9] y) { h = Conv(x, v) "
        "a = Slice(h, zero, one, one) p = Conv(a, w) q = Conv<group=3>(h, u) y = Add(p, q) }",
        {"v": (6, 3, 1, 1), "w": (6, 1, 1, 1), "u": (6, 2, 1, 1)},
        {"zero": np.array([0]), "one": np.array([1])},
    ),
    "no channels": (
        S + "{ h = MatMul(x, v) y = MatMul(h, w) }",
        {"v": (8, 0), "w": (0, 6)},
        {},
    ),
    "data read along two axes": (
        "g (float[B, 5, 8] x) => (float[B, 5, 6] y, float[B, 8, 6] z) "
        "{ n = LayerNormalization(x, g) y = MatMul(n, w) "
        "t = Transpose<perm=[0, 2, 1]>(n) z = MatMul(t, u) }",
        {"g": (8,), "w": (8, 6), "u": (5, 6)},
        {},
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_scaling_changes_nothing(name: str, tmp_path: Path) -> None:
    text, shapes, constants = GRAPHS[name]
    weights = {key: random_array(*shape, seed=n) for n, (key, shape) in enumerate(shapes.items())}
    before, after = (build(text, weights | constants) for _ in range(2))
    groups, refusals = groups_of(after)
    behind = [group_behind_mul(refusal.data, refusal.readers) for refusal in refusals]
    taken = value_names(after)
    with WeightStore(tmp_path) as store:
        found = [*groups, *(group for group in behind if isinstance(group, ChannelGroup))]
        for seed, group in enumerate(found):
            for reader in group.readers:
                assert len(reader.channels) == reader.site.reduction * (
                    3 if name == "one channel of several" and len(reader.channels) == 6 else 1
                )
            scale_group(group, random_scales(group, seed), store, taken, "test")
        assert list(structural_faults(after)) == []
        assert_parity(before, after, tolerance=1e-4)


OLD = {
    "Pad": (10, "p = Pad<pads=[0, 0, 1, 0, 0, 1]>(h)"),
    "Slice": (9, "p = Slice<axes=[2], starts=[0], ends=[3]>(h)"),
}


@pytest.mark.parametrize("op", OLD)
def test_attributes_of_old_operator_sets_are_refused(op: str) -> None:
    opset, node = OLD[op]
    text = f"g (float[N, 3, 6] x) => (float[N, 5, L] y) {{ h = Conv(x, v) {node} y = Conv(p, w) }}"
    weights = {"v": random_array(4, 3, 1), "w": random_array(5, 4, 1)}
    groups, refusals = groups_of(build(text, weights, opset=opset))
    assert not groups
    assert "attributes of an old operator set" in refusals[-1].reason


def test_a_vector_behind_a_mul_has_no_such_axis() -> None:
    text = "g (float[7] x) => (float[6] y) { h = Gelu(x) y = MatMul(v, h) }"
    _, refusals = groups_of(build(text, {"v": random_array(6, 7)}))
    assert refusals
    assert all(isinstance(group_behind_mul(r.data, r.readers), str) for r in refusals)
