"""What each stage forbids."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.provenance import CREATED_BY, SCHEME
from qcompiler.rewriting.legality import violations
from qcompiler.rewriting.stages import Stage
from tests.support.graphs import build, random_array

_DQ = """g (float[N, 4] x) => (float[N, 3] y) {
    [dq] w = DequantizeLinear<axis=1>(q, s, z)
    [mm] y = MatMul(x, w)
}"""


def _rules(model: ir.Model, stage: Stage) -> list[str]:
    return [violation.rule for violation in violations(model, stage)]


def _dq(scale: object, zero_point: object) -> ir.Model:
    weights = {"q": np.ones((4, 3), np.int8), "s": scale, "z": zero_point}
    return build(_DQ, weights)


def test_a_good_model_has_no_violations() -> None:
    model = _dq(np.full(3, 0.1, np.float32), np.zeros(3, np.int8))
    assert _rules(model, Stage.LOWERED) == []


@pytest.mark.parametrize("value", [0.0, -0.1, np.nan, np.inf])
def test_scales_are_positive_and_finite(value: float) -> None:
    model = _dq(np.full(3, value, np.float32), np.zeros(3, np.int8))
    assert _rules(model, Stage.QDQ) == ["positive-scales"]


def test_zero_points_match_codes_and_scales() -> None:
    assert _rules(_dq(np.full(3, 0.1, np.float32), np.zeros(3, np.uint8)), Stage.QDQ) == [
        "zero-points"
    ]
    assert _rules(_dq(np.full(3, 0.1, np.float32), np.zeros(2, np.int8)), Stage.QDQ) == [
        "zero-points"
    ]


@pytest.mark.parametrize(
    ("attributes", "shape", "rules"),
    [
        ("axis=1", (3,), []),
        ("axis=-1", (3,), []),
        ("axis=0", (4,), []),
        ("axis=0", (3,), ["scale-shapes"]),
        ("axis=0", (1,), []),
        ("axis=0", (), []),
        ("axis=7", (), []),
        ("axis=7", (3,), ["scale-shapes"]),
        ("axis=0, block_size=2", (2, 3), []),
        ("axis=0, block_size=3", (2, 3), []),
        ("axis=1, block_size=2", (4, 2), []),
        ("axis=1, block_size=2", (2, 3), ["scale-shapes"]),
        ("axis=0, block_size=2", (3,), ["scale-shapes"]),
    ],
)
def test_scales_have_the_shape_of_their_granularity(
    attributes: str, shape: tuple[int, ...], rules: list[str]
) -> None:
    text = _DQ.replace("axis=1", attributes).replace("q, s, z", "q, s")
    weights = {"q": np.ones((4, 3), np.int8), "s": np.full(shape, 0.1, np.float32)}
    assert _rules(build(text, weights), Stage.QDQ) == rules


@pytest.mark.parametrize(
    ("dtype", "attributes", "lowest"),
    [
        (ir.DataType.INT8, "axis=1", 0),
        (ir.DataType.INT8, "axis=0, block_size=4", 21),
        (ir.DataType.UINT4, "axis=1", 21),
        (ir.DataType.INT2, "axis=1", 25),
    ],
)
def test_the_opset_has_what_quantizers_use(
    dtype: ir.DataType, attributes: str, lowest: int
) -> None:
    text = _DQ.replace("axis=1", attributes).replace("q, s, z", "q, s")
    scale = np.full((1, 3) if "block" in attributes else 3, 0.1, np.float32)
    codes = ir.tensor(np.ones((4, 3), dtype.numpy()), dtype=dtype)
    for opset in (20, 21, 24, 25):
        model = build(text, {"q": codes, "s": scale}, opset=opset)
        assert _rules(model, Stage.QDQ) == (["qdq-opset"] if opset < lowest else [])


@pytest.mark.parametrize("scheme", ["w8a16:asym", "w3a16:asym"])
def test_zero_points_are_codes_of_the_scheme(scheme: str) -> None:
    model = _dq(np.full(3, 0.1, np.float32), np.array([0, 7, 8], np.uint8))
    model.graph.initializers["q"].const_value = ir.tensor(np.ones((4, 3), np.uint8), name="q")
    model.graph.initializers["q"].dtype = ir.DataType.UINT8
    model.graph.node("mm").metadata_props[SCHEME] = scheme
    assert _rules(model, Stage.QDQ) == []  # a DequantizeLinear of the source model
    model.graph.node("dq").metadata_props[CREATED_BY] = "insert-qdq"
    assert _rules(model, Stage.QDQ) == (["zero-point-range"] if "w3" in scheme else [])


def test_weights_are_stored_as_codes() -> None:
    model = build(
        """g (float[N, 4] x) => (float[N, 3] y) {
            [q] c = QuantizeLinear(w, s)
            [dq] d = DequantizeLinear(c, s)
            [mm] y = MatMul(x, d)
        }""",
        {"w": random_array(4, 3), "s": np.float32(0.1)},
    )
    assert _rules(model, Stage.QDQ) == ["integer-weights"]


def test_constant_nodes_and_missing_names_are_not_canonical() -> None:
    model = build(
        """g (float[1] x) => (float[1] y) {
            [c] c = Constant<value = float[1] {2.0}>()
            y = Add(x, c)
        }"""
    )
    model.graph[1].name = ""
    assert _rules(model, Stage.CANONICAL) == ["no-constant-nodes", "unique-names"]


def test_every_site_of_an_assigned_model_has_a_scheme() -> None:
    model = build(
        "g (float[N, 4] x) => (float[N, 3] y) { [mm] y = MatMul(x, w) }",
        {"w": random_array(4, 3)},
    )
    assert _rules(model, Stage.ASSIGNED) == ["schemes-assigned"]
    model.graph[0].metadata_props[SCHEME] = "float"
    assert _rules(model, Stage.ASSIGNED) == ["schemes-assigned"]  # float needs a reason
    model.graph[0].metadata_props[SCHEME] = "w8a16"
    assert _rules(model, Stage.ASSIGNED) == ["schemes-readable"]  # symmetric or not is open
    model.graph[0].metadata_props[SCHEME] = "w8a16:sym"
    assert _rules(model, Stage.ASSIGNED) == []
    assert _rules(model, Stage.QDQ) == ["schemes-applied"]
