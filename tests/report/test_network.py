"""What a calibrated compilation measures inside the graph, and writes into its report."""

from pathlib import Path

import numpy as np
import pytest

from qcompiler.calibration.error_growth import NodeError
from qcompiler.quant.recipe import Recipe, Rule, Selector
from qcompiler.quant.scheme import parse_scheme
from qcompiler.report.files import read_report
from qcompiler.report.network import added_noise
from tests.support.calibrated import compile_calibrated
from tests.support.graphs import build, random_array

MODEL = """
g (float[8, 64] x) => (float[8, 64] y) {
  [first] a = MatMul(x, u) [gain] s = Mul(a, g) [second] b = MatMul(s, v) [third] y = MatMul(b, w)
}
"""
WEIGHTS = {
    "u": random_array(64, 64, seed=1),
    "v": random_array(64, 64, seed=2),
    "w": random_array(64, 64, seed=3),
    "g": np.geomspace(0.01, 10, 64).astype(np.float32),
}


def test_the_report_says_where_error_comes_in(tmp_path: Path) -> None:
    coarse = Recipe(
        (Rule(Selector(name="second"), parse_scheme("w2a16:b32"), "coarse", "test"),),
        parse_scheme("w8a8"),
    )
    feeds = {"x": random_array(8, 64, seed=5)}
    made = compile_calibrated(build(MODEL, WEIGHTS), feeds, tmp_path, recipe=coarse)
    nodes = {node.name: node for node in made.result.report.nodes}
    first, second, third = (nodes[name] for name in ("first", "second", "third"))
    assert first.output_sqnr_db is not None
    assert second.output_sqnr_db is not None
    assert first.output_sqnr_db > 25
    assert second.output_sqnr_db < 20
    assert third.data_sqnr_db == pytest.approx(second.output_sqnr_db)
    # The end of the last op is the model's output, which is measured by other means as well.
    (output,) = made.result.report.calibration.outputs if made.result.report.calibration else ()
    assert third.output_sqnr_db == pytest.approx(output.emulated_db, abs=0.05)
    assert made.result.report.channels[0].node == "second"
    assert read_report(made.result.report_path) == made.result.report
    assert made.result.page_path is not None
    assert "Accuracy along the network" in made.result.page_path.read_text()


def test_equalized_channels_are_seen_before_and_after(tmp_path: Path) -> None:
    feeds = {"x": random_array(8, 64, seed=5)}
    report = compile_calibrated(build(MODEL, WEIGHTS), feeds, tmp_path).result.report
    equalized = {n.name for n in report.nodes if (n.equalized or "").startswith("by ")}
    changed = {p.node for p in report.channels if p.data_before != p.data_after}
    assert changed
    assert changed <= equalized
    (equalize,) = (record for record in report.passes if record.name == "equalize-channels")
    assert equalize.changes
    assert equalize.nodes is not None


def test_added_noise_is_that_of_the_op_alone() -> None:
    assert added_noise(NodeError(None, 20.0)) == pytest.approx(0.01)
    assert added_noise(NodeError(20.0, 20.0)) == 0
    assert added_noise(NodeError(float("inf"), 10.0)) == pytest.approx(0.1)
    assert added_noise(NodeError(10.0, None)) == 0
