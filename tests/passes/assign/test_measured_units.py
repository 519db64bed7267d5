"""What is measured together."""

from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.provenance import REGION
from qcompiler.passes.assign.measured_units import Unit, alternative, find_units
from qcompiler.quant.scheme import Activations
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from tests.support.graphs import build, random_array
from tests.support.regions import planned


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
