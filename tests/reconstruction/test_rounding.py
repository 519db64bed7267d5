"""Weights that stay in float in part, and where a run begins."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import UsageError
from qcompiler.ir.provenance import annotate
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.progress import SilentProgress
from qcompiler.quant.arithmetic import dequantize
from qcompiler.quant.granularity import PerAxis, PerBlock
from qcompiler.reconstruction.rounding import Outcome, RoundingRun, round_model
from qcompiler.reconstruction.starting_point import StartingPoint, edges, quantize_to_start
from qcompiler.reconstruction.weight_rounding import Mask, RoundingSettings
from qcompiler.rewriting.base import PassContext
from tests.reconstruction.test_compensation import correlated
from tests.support.graphs import Array, build, initializer, node_named, random_array, serialized
from tests.support.reconstruction import samples_of

_TEXT = """g (float[N, 32] x) => (float[N, 8] y) {
    [up] h = MatMul(x, w)
    [act] r = Relu(h)
    [down] y = MatMul(r, v)
}"""
_WEIGHTS = {"w": random_array(32, 24), "v": random_array(24, 8, seed=1)}
_DATA = (correlated(200, 32) / 5).astype(np.float32)


def _start(folder: Path, scheme: str, weight: Array | None = None) -> StartingPoint:
    weights = _WEIGHTS if weight is None else _WEIGHTS | {"w": weight}
    model = build(_TEXT, weights, opset=25)
    for name in ("up", "down"):
        annotate(node_named(model, name), scheme=scheme)
    return quantize_to_start(model, [InsertQdq()], PassContext(WeightStore(folder)))


def _round(
    start: StartingPoint, folder: Path, masks: dict[str, Mask] | None = None, **settings: Any
) -> dict[str, Outcome]:
    outcomes = round_model(
        start,
        samples_of([{"x": _DATA[:120]}, {"x": _DATA[120:]}]),
        RoundingRun(RoundingSettings(**settings)),
        WeightStore(folder),
        SilentProgress(),
        masks,
    )
    return {outcome.weight.name: outcome for outcome in outcomes}


def _restored(model: ir.Model, name: str, granularity: PerAxis | PerBlock) -> Array:
    codes = initializer(model, f"{name}.codes").astype(np.uint8)
    zero = initializer(model, f"{name}.zero_point").astype(np.uint8)
    return dequantize(codes, initializer(model, f"{name}.scale"), zero, granularity)


@pytest.mark.parametrize("scheme", ["w2a16:asym", "w2a16:b16:asym"])
def test_a_mask_of_nothing_changes_nothing(scheme: str, tmp_path: Path) -> None:
    plain, masked = _start(tmp_path, scheme), _start(tmp_path, scheme)
    _round(plain, tmp_path)
    masks = {name: np.zeros(weight.shape, np.bool_) for name, weight in _WEIGHTS.items()}
    found = _round(masked, tmp_path, masks)
    assert serialized(plain.model) == serialized(masked.model)
    assert [found[name].kept.size for name in "wv"] == [0, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", ["w2a16:asym", "w2a16:b16:asym"])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_mask_of_everything_leaves_the_floats(
    scheme: str, act_order: bool, tmp_path: Path
) -> None:
    start = _start(tmp_path, scheme)
    masks = {name: np.ones(weight.shape, np.bool_) for name, weight in _WEIGHTS.items()}
    found = _round(start, tmp_path, masks, act_order=act_order)
    for name, weight in _WEIGHTS.items():
        kept = found[name].kept
        assert kept is not None
        np.testing.assert_array_equal(kept.reshape(weight.shape), weight)
        granularity = PerBlock(0, 16) if "b16" in scheme else PerAxis(1)
        assert not _restored(start.model, name, granularity).any()


@pytest.mark.parametrize("scheme", ["w2a16:asym", "w2a16:b16:asym"])
def test_kept_elements_improve_the_output(scheme: str, tmp_path: Path) -> None:
    granularity = PerBlock(0, 16) if "b16" in scheme else PerAxis(1)
    mask = np.abs(_WEIGHTS["w"]) > 1.8
    assert 0.01 < mask.mean() < 0.1
    plain, masked = _start(tmp_path, scheme), _start(tmp_path, scheme)
    _round(plain, tmp_path)
    found = _round(masked, tmp_path, {"w": mask})["w"]
    weight = _restored(masked.model, "w", granularity)
    assert not weight[mask].any()
    assert found.kept is not None
    weight[mask] = found.kept
    assert not np.allclose(found.kept, _WEIGHTS["w"][mask])

    def error(values: Array) -> float:
        return float(np.square(_DATA @ (values - _WEIGHTS["w"])).sum())

    assert error(weight) < 0.7 * error(_restored(plain.model, "w", granularity))


@pytest.mark.parametrize("scheme", ["w2a16:asym", "w2a16:b16:asym"])
@pytest.mark.parametrize("static", [False, True])
def test_scales_are_chosen_without_kept_elements(scheme: str, static: bool, tmp_path: Path) -> None:
    mask = np.abs(_WEIGHTS["w"]) > 1.5
    found = []
    for size in (1e3, 2e3):
        # Start codes are of no use with such elements, so that every channel gets new ones.
        weight = np.where(mask, np.sign(_WEIGHTS["w"]) * size, _WEIGHTS["w"]).astype(np.float32)
        start = _start(tmp_path, scheme, weight)
        outcome = _round(start, tmp_path, {"w": mask}, static_scales=static)["w"]
        assert outcome.changed == mask.any(axis=0).sum() == 24
        found.append([initializer(start.model, f"w.{part}") for part in ("codes", "scale")])
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_a_mask_must_fit_its_weight(tmp_path: Path) -> None:
    start = _start(tmp_path, "w4a16:asym")
    for name, shape in (("w", (24, 32)), ("u", (32, 24))):
        with pytest.raises(UsageError, match=f"{name}: a mask of shape"):
            _round(start, tmp_path, {name: np.ones(shape, np.bool_)})


def test_later_blocks_see_what_is_kept(tmp_path: Path) -> None:
    one, other = _start(tmp_path, "w2a16:asym"), _start(tmp_path, "w2a16:asym")
    _round(one, tmp_path, {"w": np.ones((32, 24), np.bool_)})
    _round(other, tmp_path)
    # With w in float the data of v is that of the float model.
    data = np.maximum(_DATA @ _WEIGHTS["w"], 0)

    def error(start: StartingPoint) -> float:
        difference = _restored(start.model, "v", PerAxis(1)) - _WEIGHTS["v"]
        return float(np.square(data @ difference).sum())

    assert error(one) < error(other)


def test_a_start_remembers_the_float_graph(tmp_path: Path) -> None:
    start = _start(tmp_path, "w4a16:b16:asym")
    assert [node.op_type for node in start.original.graph] == ["MatMul", "Relu", "MatMul"]
    assert len(start.blocks) == 2
    for weight in start.weights:
        np.testing.assert_array_equal(weight.tensor.numpy(), _WEIGHTS[weight.name])
        assert weight.codes.name == f"{weight.name}.codes"
        assert weight.dequantized == (f"{weight.name}.dequantized",)
    assert {node.name: level for node, level in start.levels.items()} == {"up": 0, "down": 0}


def test_what_errors_of_channels_cost_is_of_the_damped_hessian(tmp_path: Path) -> None:
    found = _round(_start(tmp_path, "w4a16:b16:asym"), tmp_path)["w"].importance
    hessian = 2 * _DATA.T.astype(np.float64) @ _DATA
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(32)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    assert found is not None
    np.testing.assert_allclose(found, 1 / np.diag(upper)[None] ** 2, rtol=1e-4)


def test_levels_follow_the_way_through_a_block(tmp_path: Path) -> None:
    text = """g (float[N, 8] x) => (float[N, 8] z) {
        [q] a = MatMul(x, w0)
        [k] b = MatMul(x, w1)
        c = Mul(a, b)
        [o] d = MatMul(c, w2)
        z = Add(d, a)
    }"""
    model = build(text, {f"w{at}": random_array(8, 8, seed=at) for at in range(3)}, opset=25)
    for name in "qko":
        annotate(node_named(model, name), scheme="w4a16:sym")
    start = quantize_to_start(model, [InsertQdq()], PassContext(WeightStore(tmp_path)))
    assert {node.name: level for node, level in start.levels.items()} == {"q": 0, "k": 0, "o": 1}


def test_edges_are_all_but_contents(tmp_path: Path) -> None:
    start = _start(tmp_path, "w4a16:asym")
    before = edges(start.model)
    codes = start.weights[0].codes
    assert codes.const_value is not None
    zeros = np.zeros((32, 24), np.uint8)
    codes.const_value = WeightStore(tmp_path).put("w.codes", zeros, codes.const_value.dtype)
    node_named(start.model, "up").metadata_props["note"] = "other"
    assert edges(start.model) == before
    node = node_named(start.model, "down")
    node.replace_input_with(0, start.model.graph.inputs[0])
    assert edges(start.model) != before
