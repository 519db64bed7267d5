"""What is measured together."""

from pathlib import Path

import onnx_ir as ir

from qcompiler.execution.measurements import Measurements
from qcompiler.ir.provenance import REGION
from qcompiler.ir.shapes import infer_shapes
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.assign.assign_schemes import AssignOptions, AssignSchemes
from qcompiler.passes.assign.latency_choice import Variant
from qcompiler.passes.assign.measured_units import Unit, alternative, find_products, find_units
from qcompiler.passes.assign.region_bench import Workshop, measure_as_planned
from qcompiler.quant.recipe import Recipe
from qcompiler.quant.scheme import Activations, parse_scheme
from qcompiler.rewriting.base import PassContext
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from tests.support.graphs import build, op_types, random_array
from tests.support.regions import REMAINING, FakeBench, place, planned


def names(units: list[Unit]) -> list[list[str]]:
    return [[node.name or "" for node in unit.nodes] for unit in units]


def products(text: str, outputs: str = "float[N, 64] y", **weights: object) -> ir.Model:
    found = {"w": random_array(64, 64), "b": random_array(64), **weights}
    return build(f"g (float[N, 64] x) => ({outputs}) {{ {text} }}", found)


def test_products_that_read_one_value_are_one_unit(tmp_path: Path) -> None:
    model = products(
        """[q] q = MatMul(x, w) [k] k = MatMul(x, v) [s] s = Softmax(q)
           [o] o = MatMul(s, u) [y] y = Sub(o, k)""",
        v=random_array(64, 64),
        u=random_array(64, 64),
    )
    units = find_units(planned(model, tmp_path))
    assert names(units) == [["q", "k"], ["o"]]
    assert [unit.products_only for unit in units] == [True, True]
    assert [unit.data.name for unit in units] == ["x", "s"]


def test_products_that_share_a_weight_are_one_unit(tmp_path: Path) -> None:
    model = products("[p] p = MatMul(x, w) [s] s = Softmax(p) [y] y = MatMul(s, w)")
    assert names(find_units(planned(model, tmp_path))) == [["p", "y"]]


def test_a_bias_behind_a_product_runs_with_it(tmp_path: Path) -> None:
    model = products("[p] p = MatMul(x, w) [add] a = Add(b, p) [y] y = Softmax(a)")
    (unit,) = find_units(planned(model, tmp_path))
    assert names([unit]) == [["p"]]
    assert [node.name for node in unit.segment.nodes] == ["p", "add"]
    assert [value.name for value in unit.segment.outputs] == ["a"]


def test_an_add_that_is_no_bias_does_not(tmp_path: Path) -> None:
    residual = products("[p] p = MatMul(x, w) [add] y = Add(x, p)")
    read_twice = products(
        "[p] p = MatMul(x, w) [add] y = Add(b, p) z = Softmax(p)", "float[N, 64] y, float[N, 64] z"
    )
    for model in (residual, read_twice):
        (unit,) = find_units(planned(model, tmp_path))
        assert [node.name for node in unit.segment.nodes] == ["p"]


def convolutions() -> ir.Model:
    return build(
        """g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {
            [c1] a = Conv<pads=[1, 1, 1, 1]>(x, w)
            [r1] b = Relu(a)
            [c2] c = Conv<pads=[1, 1, 1, 1]>(b, v)
            [sum] d = Add(c, b)
            [c3] e = Conv<pads=[1, 1, 1, 1]>(d, u)
            [y] y = Softmax(e)
        }""",
        {name: random_array(8, 8, 3, 3, seed=i) for i, name in enumerate("wvu")},
    )


def test_a_chain_of_convolutions_is_one_unit(tmp_path: Path) -> None:
    model = planned(convolutions(), tmp_path)
    assert len({n.metadata_props[REGION] for n in model.graph if REGION in n.metadata_props}) == 1
    (unit,) = find_units(model)
    assert names([unit]) == [["c1", "r1", "c2", "sum", "c3"]]
    assert not unit.products_only
    assert [value.name for value in unit.segment.inputs] == ["x"]
    assert unit.what({"x": (1, 8, 6, 6)}) == "Conv Relu Conv Add ... on [1, 8, 6, 6]"


def test_a_model_without_regions_has_no_units(tmp_path: Path) -> None:
    assert find_units(planned(products("[p] y = MatMul(x, w)"), tmp_path, exclude=("p",))) == []


def test_equal_plans_are_equal_whatever_the_names(tmp_path: Path) -> None:
    model = products(
        """[p] p = MatMul(x, w) [s] s = Softmax(p) [q] q = MatMul(s, v) [t] t = Softmax(q)
           [o] y = MatMul(t, u)""",
        v=random_array(64, 64),
        u=random_array(64, 64),
    )
    first, second, third = find_units(planned(model, tmp_path, outliers={"t": [3]}))
    assert first.plan() == second.plan() != third.plan()
    assert [unit.one_scale_is_coarse for unit in (first, second, third)] == [False, False, True]


def test_alternatives_are_those_of_the_target(tmp_path: Path) -> None:
    (unit,) = find_units(planned(products("[p] y = MatMul(x, w)"), tmp_path))
    dynamic = alternative(unit, Activations.DYNAMIC, ONNXRUNTIME)["p"]
    assert str(dynamic.scheme).startswith("w8a8-dynamic")
    assert str(alternative(unit, Activations.FLOAT, ONNXRUNTIME)["p"].scheme).startswith("w8a16")
    (unit,) = find_units(planned(convolutions(), tmp_path))
    assert alternative(unit, Activations.DYNAMIC, ONNXRUNTIME) == {}


def test_products_with_float_data_stand_alone(tmp_path: Path) -> None:
    model = products(
        """[q] q = MatMul(x, w) [add] a = Add(b, q) [k] k = MatMul(x, v) [s] s = Softmax(a)
           [y] y = Sub(s, k)""",
        v=random_array(64, 64),
    )
    infer_shapes(model)
    context = PassContext(WeightStore(tmp_path))
    recipe = Recipe.uniform(parse_scheme("w8a16"), ("k",))
    AssignSchemes(AssignOptions(recipe, ONNXRUNTIME)).run(model, context)
    assert not find_units(model)
    (unit,) = find_products(model)
    assert names([unit]) == [["q"]]
    assert [node.name for node in unit.segment.nodes] == ["q", "add"]
    assert unit.data.name == "x"
    bench = FakeBench(**{"weight-only": 0.5})  # by its codes that is what it is
    workshop = Workshop(ONNXRUNTIME, place(), REMAINING, bench)
    feeds = {"x": random_array(4, 64)}
    measurements = Measurements(None)
    for _ in range(2):
        (timings,) = measure_as_planned(model, [unit], feeds, workshop, measurements, context)
        assert timings[Variant.PLANNED].ratio == 0.5
    ((float_model, planned_model),) = bench.seen
    assert op_types(float_model) == ["MatMul", "Add"]
    assert op_types(planned_model)[-2:] == ["MatMul", "Add"] != op_types(planned_model)
