"""Changing the plan of regions that lose to float, with times that are made up."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import TargetError, UsageError
from qcompiler.execution.sessions import open_session
from qcompiler.ir.provenance import (
    FLOAT_MS,
    PAIR_LIMIT,
    PLACEMENT,
    QUANTIZED_MS,
    QUANTIZER,
    RANGE,
    REASON,
    RULE,
    SCHEME,
)
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.assign.latency_choice import Variant
from qcompiler.rewriting.base import PassContext
from tests.support.graphs import Array, build, node_named, random_array, serialized
from tests.support.regions import (
    REMAINING,
    FakeBench,
    drop_slow_regions,
    planned,
    variant_of,
)

CALLS = [{"x": random_array(rows, 64, seed=rows)} for rows in (2, 5, 3)]


def product() -> ir.Model:
    return build(
        "g (float[N, 64] x) => (float[N, 64] y) { [p] p = MatMul(x, w) [y] y = Softmax(p) }",
        {"w": random_array(64, 64)},
    )


def convolutions() -> ir.Model:
    return build(
        """g (float[N, 16, 6, 6] x) => (float[N, 16, 6, 6] y) {
            [c1] a = Conv<pads=[1, 1, 1, 1]>(x, w)
            [r1] b = Relu(a)
            [c2] c = Conv<pads=[1, 1, 1, 1]>(b, v)
            [sum] d = Add(c, b)
            [c3] e = Conv<pads=[1, 1, 1, 1]>(d, u)
            [y] y = Softmax(e)
        }""",
        {name: random_array(16, 16, 3, 3, seed=i) for i, name in enumerate("wvu")},
    )


IMAGES = [{"x": random_array(1, 16, 6, 6)}]


def scheme(model: ir.Model, name: str) -> str:
    return node_named(model, name).metadata_props[SCHEME]


# What it rewrites


def test_a_fast_region_stays_and_says_how_fast_it_is(tmp_path: Path) -> None:
    model = planned(product(), tmp_path)
    before = scheme(model, "p")
    bench = FakeBench(planned=0.6, dynamic=0.7, **{"weight-only": 0.9})
    result = drop_slow_regions(model, tmp_path, bench, CALLS)
    facts = node_named(model, "p").metadata_props
    assert facts[SCHEME] == before
    assert PLACEMENT in facts
    assert (facts[FLOAT_MS], facts[QUANTIZED_MS]) == ("2.000", "1.200")
    (rewrite,) = result.rewrites
    assert (rewrite.node, rewrite.detail) == ("p", "0.60 of float's time at [5, 64]")
    assert not result.skips


def test_a_slow_product_is_left_in_float(tmp_path: Path) -> None:
    model = planned(product(), tmp_path)
    bench = FakeBench(planned=1.31, dynamic=1.4, **{"weight-only": 1.5})
    (skip,) = drop_slow_regions(model, tmp_path, bench, CALLS).skips
    facts = node_named(model, "p").metadata_props
    assert facts[SCHEME] == "float"
    assert facts[RULE] == "never-slower"
    reason = "left in float by --never-slower: w8a8:sym is slower than float at [5, 64]"
    assert facts[REASON] == reason
    assert (facts[FLOAT_MS], facts[QUANTIZED_MS]) == ("2.000", "2.620")
    assert PLACEMENT not in facts
    assert PAIR_LIMIT not in facts
    assert QUANTIZER not in model.graph.inputs[0].metadata_props
    assert RANGE in model.graph.inputs[0].metadata_props
    assert (skip.rule, skip.node) == ("never-slower", "p")
    assert skip.reason == f"{reason}, 1.31 of its time"


@pytest.mark.parametrize(
    ("ratios", "variant", "text"),
    [
        ({"planned": 0.6, "dynamic": 0.5, "weight-only": 0.9}, Variant.DYNAMIC, "w8a8-dynamic"),
        ({"planned": 0.6, "dynamic": 0.7, "weight-only": 0.3}, Variant.WEIGHTS, "w8a16"),
        ({"planned": 1.3, "dynamic": 1.3, "weight-only": 1.01}, Variant.WEIGHTS, "w8a16"),
    ],
)
def test_a_product_gets_what_is_faster(
    tmp_path: Path, ratios: dict[str, float], variant: Variant, text: str
) -> None:
    model = planned(product(), tmp_path)
    planned_scheme = scheme(model, "p")
    drop_slow_regions(model, tmp_path, FakeBench(**ratios), CALLS)
    facts = node_named(model, "p").metadata_props
    assert facts[SCHEME].startswith(text)
    assert facts[RULE] not in ("never-slower", "qlinear-matmul")
    assert facts[REASON].startswith(
        f"chosen by --never-slower: faster than {planned_scheme} at [5, 64]; runs as "
    )
    assert facts[QUANTIZED_MS] == f"{2 * ratios[variant.value]:.3f}"
    with WeightStore(tmp_path) as store:
        for rewrite in REMAINING:
            rewrite.run(model, PassContext(store))
        assert variant_of(model) is variant


def test_a_slow_chain_gets_integer_weights(tmp_path: Path) -> None:
    model = planned(convolutions(), tmp_path)
    bench = FakeBench(planned=1.2, **{"weight-only": 1.0})
    drop_slow_regions(model, tmp_path, bench, IMAGES)
    for name in ("c1", "c2", "c3"):
        assert scheme(model, name).startswith("w8a16")
        assert node_named(model, name).metadata_props[RULE] == "decoded-at-load"
    for name in ("c1", "r1", "c2", "sum", "c3"):
        facts = node_named(model, name).metadata_props
        assert PLACEMENT not in facts
        assert FLOAT_MS in facts


def test_a_chain_that_loses_whatever_is_done_is_left_in_float(tmp_path: Path) -> None:
    model = planned(convolutions(), tmp_path)
    bench = FakeBench(planned=1.2, **{"weight-only": 1.1})
    drop_slow_regions(model, tmp_path, bench, IMAGES)
    assert [scheme(model, name) for name in ("c1", "c2", "c3")] == ["float"] * 3
    assert [len(models) for models in bench.seen] == [2, 2]


def test_a_fast_chain_is_measured_once(tmp_path: Path) -> None:
    model = planned(convolutions(), tmp_path)
    bench = FakeBench(planned=0.7)
    drop_slow_regions(model, tmp_path, bench, IMAGES)
    ((as_float, quantized),) = bench.seen
    assert [variant_of(as_float), variant_of(quantized)] == [Variant.FLOAT, Variant.PLANNED]


def test_what_is_measured_is_what_is_shipped(tmp_path: Path) -> None:
    model = planned(product(), tmp_path)
    bench = FakeBench(planned=0.6, dynamic=0.7, **{"weight-only": 0.9})
    drop_slow_regions(model, tmp_path, bench, CALLS)
    (models,) = bench.seen
    assert [variant_of(m) for m in models] == [
        Variant.FLOAT,
        Variant.PLANNED,
        Variant.DYNAMIC,
        Variant.WEIGHTS,
    ]
    assert bench.feeds[0]["x"].tolist() == CALLS[1]["x"].tolist()
    for measured in models:
        assert run(measured, CALLS[1]["x"]).shape == (5, 64)
    assert run(models[0], CALLS[1]["x"]).tolist() != run(models[1], CALLS[1]["x"]).tolist()


def run(model: ir.Model, x: Array) -> Array:
    with open_session(model, optimize=True) as session:
        (result,) = session.run({"x": x}).values()
    return result


def chain() -> ir.Model:
    names = "abcd"
    lines = " ".join(
        f"[{n}] {n} = MatMul({before}, w{n}) [s{n}] s{n} = Softmax({n})"
        for n, before in zip(names, ["x", "sa", "sb", "sc"], strict=True)
    )
    return build(
        f"g (float[N, 64] x) => (float[N, 64] y) {{ {lines} [y] y = Sub(sd, x) }}",
        {f"w{n}": random_array(64, 64, seed=i) for i, n in enumerate(names)},
    )


def test_equal_regions_are_measured_once(tmp_path: Path) -> None:
    model = planned(chain(), tmp_path, outliers={"sb": [1], "sc": [2, 3]})
    bench = FakeBench(planned=1.2, dynamic=0.5, **{"weight-only": 1.2})
    drop_slow_regions(model, tmp_path, bench, CALLS)
    assert len(bench.seen) == 2
    found = [scheme(model, name) for name in "abcd"]
    assert found == [found[0], found[0], "float", "float"]
    # With outlier channels, a range of each run would leave the others few codes.
    assert found[0].startswith("w8a8-dynamic")
    assert Variant.DYNAMIC not in {variant_of(m) for m in bench.seen[1]}


def test_many_regions_share_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.passes.assign.region_bench._UNITS", 1)
    monkeypatch.setattr("qcompiler.passes.assign.region_bench._SECONDS_BEYOND", 0.3)
    model = planned(chain(), tmp_path, outliers={"sb": [1]})
    bench = FakeBench(planned=0.6, dynamic=0.6, **{"weight-only": 0.6})
    drop_slow_regions(model, tmp_path, bench, CALLS)
    assert [budget.seconds for budget in bench.budgets] == [0.6, 0.3]


# What it refuses


def test_without_regions_nothing_runs(tmp_path: Path) -> None:
    model = planned(product(), tmp_path, exclude=("p",))
    before = serialized(model)
    bench = FakeBench()
    result = drop_slow_regions(model, tmp_path, bench, [])
    assert not result.modified
    assert not bench.seen
    assert serialized(model) == before


def test_a_call_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    model = planned(chain(), tmp_path)
    with pytest.raises(TargetError):
        drop_slow_regions(model, tmp_path, FakeBench(), [{"x": random_array(2, 63)}])


# The file of measurements


def test_what_is_in_the_file_is_not_measured(tmp_path: Path) -> None:
    path, texts = tmp_path / "m.json", []
    for ratio in (1.3, 0.1):
        model = planned(chain(), tmp_path)
        bench = FakeBench(planned=ratio, dynamic=ratio, **{"weight-only": ratio})
        drop_slow_regions(model, tmp_path, bench, CALLS, path)
        texts.append((serialized(model), path.read_bytes()))
        assert len(bench.seen) == (1 if ratio == 1.3 else 0)
    assert texts[0] == texts[1]


def test_other_shapes_are_measured_and_added(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    bench = FakeBench(planned=0.5, dynamic=0.6, **{"weight-only": 0.6})
    for calls in (CALLS, CALLS[:1], CALLS, CALLS[:1]):
        drop_slow_regions(planned(product(), tmp_path), tmp_path, bench, calls, path)
    assert len(bench.seen) == 2


def test_an_entry_that_lacks_a_variant_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    bench = FakeBench(planned=0.5, dynamic=0.6, **{"weight-only": 0.6})
    drop_slow_regions(planned(product(), tmp_path), tmp_path, bench, CALLS, path)
    path.write_text(path.read_text().replace('"planned"', '"plan"'))
    drop_slow_regions(planned(product(), tmp_path), tmp_path, bench, CALLS, path)
    assert len(bench.seen) == 2


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text("{")
    with pytest.raises(UsageError, match="no JSON"):
        drop_slow_regions(planned(product(), tmp_path), tmp_path, FakeBench(), CALLS, path)


# It is idempotent, and keeps numerics


@pytest.mark.parametrize("ratio", [0.5, 1.5])
def test_a_second_run_changes_nothing(tmp_path: Path, ratio: float) -> None:
    model = planned(chain(), tmp_path)
    bench = FakeBench(planned=ratio, dynamic=ratio, **{"weight-only": ratio})
    drop_slow_regions(model, tmp_path, bench, CALLS)
    before = serialized(model)
    drop_slow_regions(model, tmp_path, bench, CALLS)
    assert serialized(model) == before


def test_the_graph_computes_the_same(tmp_path: Path) -> None:
    model = planned(chain(), tmp_path)
    x = CALLS[1]["x"]
    before = run(model, x)
    ops = [node.op_type for node in model.graph]
    bench = FakeBench(planned=1.5, dynamic=1.5, **{"weight-only": 1.5})
    drop_slow_regions(model, tmp_path, bench, CALLS)
    assert [node.op_type for node in model.graph] == ops
    np.testing.assert_array_equal(run(model, x), before)
