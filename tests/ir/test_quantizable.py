"""The table of ops with weights: axes, sites, and why an op is no site."""

import numpy as np
import pytest

from qcompiler.ir.quantizable import TABLE, WeightAxes, find_sites
from qcompiler.quant.granularity import PerAxis, PerBlock
from qcompiler.quant.scheme import QScheme
from tests.support.graphs import build, random_array


@pytest.mark.parametrize(
    ("node", "weight", "axes"),
    [
        ("y = MatMul(x, w)", (3, 4), WeightAxes(0, 1)),
        ("y = MatMul(x, w)", (2, 3, 4), WeightAxes(1, 2)),
        ("y = MatMul(x, w)", (3,), WeightAxes(0, None)),
        ("y = MatMul(w, x)", (3, 4), WeightAxes(1, 0)),
        ("y = Gemm(x, w)", (3, 4), WeightAxes(0, 1)),
        ("y = Gemm<transB=1>(x, w)", (4, 3), WeightAxes(1, 0)),
        ("y = Gemm<transA=1>(w, x)", (3, 4), WeightAxes(0, 1)),
        ("y = Conv(x, w)", (8, 3, 3, 3), WeightAxes(1, 0)),
        ("y = ConvTranspose(x, w)", (3, 8, 2, 2), WeightAxes(0, 1)),
        ("y = Gather(w, i)", (10, 4), WeightAxes(1, 0)),
    ],
)
def test_axes_of_the_weight(node: str, weight: tuple[int, ...], axes: WeightAxes) -> None:
    model = build(
        f"g (float[N, C] x, int64[N] i) => (float[N] y) {{ {node} }}",
        {"w": random_array(*weight)},
    )
    (site,), _ = find_sites(model)
    assert site.axes == axes


def test_a_recurrent_op_has_two_weights() -> None:
    model = build(
        "g (float[S, B, 4] x) => (float[S, D, B, 5] y) { y = LSTM<hidden_size=5>(x, w, r) }",
        {"w": random_array(1, 20, 4), "r": random_array(1, 20, 5)},
    )
    sites, _ = find_sites(model)
    assert [(site.role, site.axes) for site in sites] == [
        ("W", WeightAxes(2, 1)),
        ("R", WeightAxes(2, 1)),
    ]


def test_axes_are_those_of_the_initializer_behind_a_transpose() -> None:
    model = build(
        """g (float[N, 4] x, int64[N] i) => (float[N, 10] y, float[N, 4] e) {
            e = Gather(table, i)
            t = Transpose<perm=[1, 0]>(table)
            y = MatMul(x, t)
        }""",
        {"table": random_array(10, 4)},
    )
    sites, _ = find_sites(model)
    assert [site.axes for site in sites] == [WeightAxes(1, 0), WeightAxes(1, 0)]
    assert sites[0].weight is sites[1].weight
    assert [len(site.transposes) for site in sites] == [0, 1]


def test_sites_inside_bodies_are_found() -> None:
    model = build(
        """g (bool c, float[N, 3] x) => (float[N, 4] y) {
            y = If(c) <
                then_branch = then () => (float[N, 4] a) { a = MatMul(x, w) },
                else_branch = other () => (float[N, 4] b) { b = MatMul(x, v) }
            >
        }""",
        {"w": random_array(3, 4), "other/v": random_array(3, 4)},
    )
    sites, _ = find_sites(model)
    assert [site.weight.name for site in sites] == ["w", "v"]


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        (
            "g (float[N, 3] x, float[3, 4] w) => (float[N, 4] y) { y = MatMul(x, w) }",
            {},
            "both inputs are computed at run time",
        ),
        (
            "g (double[N, 3] x) => (double[N, 4] y) { y = MatMul(x, w) }",
            {"w": random_array(3, 4, dtype=np.float64)},
            "has type DOUBLE",
        ),
        (
            "g (int64[N] i) => (float[3, N] y) { y = Gather<axis=1>(w, i) }",
            {"w": random_array(3, 4)},
            "is not a form Gather is quantized in",
        ),
        (
            "g (float[N, 3] x, int64[N] i) => (float[N, 3] y) { y = Gather(x, i) }",
            {},
            "looks up a computed value",
        ),
        (
            """g (float[N, 3] x) => (float[N, 4] y) {
                w = DequantizeLinear(q, s)
                y = MatMul(x, w)
            }""",
            {"q": np.ones((3, 4), np.int8), "s": np.float32(0.1)},
            "quantized already",
        ),
    ],
)
def test_ops_without_a_weight_say_why(text: str, weights: dict[str, object], reason: str) -> None:
    sites, others = find_sites(build(text, weights))
    assert sites == []
    assert [reason in other.reason for other in others] == [True]


def test_granularity_binds_to_the_axes() -> None:
    model = build(
        "g (float[N, 64] x) => (float[N, 4] y) { y = MatMul(x, w) }", {"w": random_array(64, 4)}
    )
    ((site,), _) = find_sites(model)
    assert site.granularity(QScheme(8)) == PerAxis(1)
    assert site.granularity(QScheme(4, block_size=32)) == PerBlock(0, 32)


def test_a_single_output_channel_is_one_block() -> None:
    model = build(
        "g (float[N, 64] x) => (float[N] y) { y = MatMul(x, w) }", {"w": random_array(64)}
    )
    ((site,), _) = find_sites(model)
    assert site.granularity(QScheme(8)) == PerBlock(0, 64)


def test_rows_are_unique() -> None:
    keys = [(row.domain, row.op_type) for row in TABLE]
    assert len(keys) == len(set(keys))
