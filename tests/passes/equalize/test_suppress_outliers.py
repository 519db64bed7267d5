"""Weights beyond the ordinary ones of their channel are cut off, where that helps."""

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.ir.provenance import annotate, facts_of
from qcompiler.ir.shapes import infer_shapes
from qcompiler.passes.equalize.suppress_outliers import SuppressOptions, SuppressOutliers
from qcompiler.quant.ranges import RangeMethod
from tests.support.graphs import Array, build, initializer, node_named, random_array
from tests.support.parity import run_model
from tests.support.rewrites import assert_idempotent, only_skip, reasons, run_pass

TEXT = "g (float[N, 64] x) => (float[N, 24] y) { [fc] y = MatMul(x, w) }"
PLANTED = ((3, 5), (40, 5), (7, 20))


def _weight(dtype: npt.DTypeLike = np.float32) -> Array:
    """Return a weight with three outliers, in channels 5 and 20."""
    made = np.random.default_rng(0).uniform(-1, 1, (64, 24))
    for place in PLANTED:
        made[place] = 12.0
    return made.astype(dtype)


def _samples(*, blind: bool = True, dtype: npt.DTypeLike = np.float32) -> Samples:
    """Return calls; the inputs that meet the outliers are next to nothing, or as others."""

    def read() -> Iterator[Feeds]:
        for seed in range(4):
            x = random_array(40, 64, seed=seed)
            if blind:
                x[:, [3, 7, 40]] *= 1e-3
            yield {"x": x.astype(dtype)}

    return Samples("test", False, 4, read)


def _planned(text: str = TEXT, scheme: str = "w4a16:sym", **weights: Array) -> ir.Model:
    model = build(text, weights or {"w": _weight()}, opset=21)
    infer_shapes(model)
    annotate(node_named(model, "fc"), scheme=scheme)
    return model


def _suppress(samples: Samples | None = None) -> SuppressOutliers:
    return SuppressOutliers(SuppressOptions(samples or _samples(), RangeMethod.MIN_MAX))


def test_outliers_are_cut_at_the_largest_ordinary_weight(tmp_path: Path) -> None:
    model = _planned()
    (rewrite,) = run_pass(_suppress(), model, tmp_path).rewrites
    assert rewrite.node == "fc"
    assert rewrite.detail.startswith("3 of 1536 weights, from ")
    before, after = _weight(), initializer(model, "w")
    changed = sorted(zip(*np.nonzero(before != after), strict=True))
    assert [(int(a), int(b)) for a, b in changed] == sorted(PLANTED)
    for row, column in PLANTED:
        ordinary = np.abs(before[:, column])
        assert after[row, column] == ordinary[ordinary < 12].max()
    assert "3 of 1536" in facts_of(node_named(model, "fc"))["suppressed"]


def test_outputs_on_data_that_does_not_meet_them_stay(tmp_path: Path) -> None:
    model = _planned()
    run_pass(_suppress(), model, tmp_path)
    for feeds in _samples():
        expected = run_model(_planned(), feeds)["y"]
        found = run_model(model, feeds)["y"]
        assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_outliers_that_matter_are_left(tmp_path: Path) -> None:
    model = _planned()
    skip = only_skip(run_pass(_suppress(_samples(blind=False)), model, tmp_path))
    assert "cutting does not bring its output nearer: 3 of 1536 weights, from " in skip.reason
    np.testing.assert_array_equal(initializer(model, "w"), _weight())


def test_even_weights_are_left(tmp_path: Path) -> None:
    even = np.random.default_rng(1).uniform(-1, 1, (64, 24)).astype(np.float32)
    skip = only_skip(run_pass(_suppress(), _planned(w=even), tmp_path))
    assert skip.reason == "its weight has no outliers"


def test_weights_with_other_readers_and_tables_are_refused(tmp_path: Path) -> None:
    text = """g (float[N, 64] x, int64[M] ids) => (float[N, 24] y, float[M, 24] z) {
        [fc] y = MatMul(x, w)
        [look] z = Gather(t, ids)
        [again] u = MatMul(x, w)
    }"""
    model = _planned(text, w=_weight(), t=_weight())
    annotate(node_named(model, "look"), scheme="w8a16:sym")
    result = run_pass(_suppress(), model, tmp_path)
    assert result.rewrites == ()
    assert reasons(result) == [
        "its weight w is read by others, too",
        "it multiplies its weight by nothing that samples show",
    ]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_keep_their_type(dtype: npt.DTypeLike, tmp_path: Path) -> None:
    text = TEXT.replace("float", np.dtype(dtype).name)
    model = _planned(text, w=_weight(dtype))
    result = run_pass(_suppress(_samples(dtype=dtype)), model, tmp_path)
    assert len(result.rewrites) == 1
    assert initializer(model, "w").dtype == dtype
    assert np.abs(initializer(model, "w").astype(np.float32)).max() <= 1


def test_a_convolution_is_cut_by_its_output_channels(tmp_path: Path) -> None:
    text = "g (float[N, 16, 8, 8] x) => (float[N, 12, 8, 8] y) { [fc] y = Conv(x, w) }"
    weight = np.random.default_rng(0).uniform(-1, 1, (12, 16, 1, 1)).astype(np.float32)
    weight[4, 9] = 30
    calls = [{"x": random_array(2, 16, 8, 8, seed=at)} for at in range(4)]
    for feeds in calls:
        feeds["x"][:, 9] *= 1e-3
    model = _planned(text, w=weight)
    samples = Samples("test", False, 4, lambda: iter(calls))
    (rewrite,) = run_pass(_suppress(samples), model, tmp_path).rewrites
    assert rewrite.detail.startswith("1 of 192 weights")
    assert initializer(model, "w")[4, 9] == np.sort(np.abs(weight[4]).ravel())[-2]


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    assert_idempotent(_suppress(), _planned(), tmp_path)
