"""What each stage forbids."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.provenance import SCHEME
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
