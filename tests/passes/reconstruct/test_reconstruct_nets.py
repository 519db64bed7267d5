"""Convolutions and the step sizes of their activations, learned over windows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds
from qcompiler.errors import ModelError
from qcompiler.ir.provenance import QUANTIZED_INPUTS, QUANTIZER, RANGE, annotate
from qcompiler.passes.quantize.insert_activation_qdq import InsertActivationQdq
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.passes.reconstruct.reconstruct_blocks import (
    ReconstructBlocks,
    ReconstructBlocksOptions,
)
from qcompiler.quant.reconstruction import Start
from qcompiler.reconstruction.starting_point import edges
from tests.passes.reconstruct.test_reconstruct_blocks import (
    QUICK,
    outputs_error,
    reconstructing,
    rounded,
    windows_of,
)
from tests.support.graphs import build, initializer, node_named, random_array
from tests.support.reconstruction import samples_of
from tests.support.rewrites import run_pass

_NET = """g (float[N, 3, 12, 12] x) => (float[N, 5] y) {
    [one] a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    [relu1] r = Relu(a)
    [two] b = Conv<pads = [1, 1, 1, 1]>(r, w2)
    [relu2] s = Relu(b)
    [deep] d = Conv<pads = [1, 1, 1, 1], group = 8>(s, w3)
    [join] j = Add(r, d)
    [pool] p = GlobalAveragePool(j)
    [flat] f = Flatten(p)
    [dense] y = Gemm(f, w4, b4)
}"""


def _net(scheme: str, **facts: int) -> ir.Model:
    weights = {
        "w1": random_array(8, 3, 3, 3) / 5,
        "b1": random_array(8, seed=1),
        "w2": random_array(8, 8, 3, 3, seed=2) / 8,
        "w3": random_array(8, 1, 3, 3, seed=3) / 3,
        "w4": random_array(8, 5, seed=4),
        "b4": random_array(5, seed=5),
    }
    model = build(_NET, weights, opset=25)
    for name in ("one", "two", "deep", "dense"):
        annotate(node_named(model, name), scheme=scheme, **facts)
    return model


def _images(count: int, seed: int = 0) -> list[Feeds]:
    return [{"x": random_array(4, 3, 12, 12, seed=seed + at)} for at in range(count)]


@pytest.mark.parametrize("scheme", ["w2a16:asym", "w4a16:sym"])
def test_convolutions_are_learned(scheme: str, tmp_path: Path) -> None:
    calls, calm = _images(16), replace(QUICK, steps=60, code_rate=1e-2)
    truth, model, start = (_net(scheme) for _ in range(3))
    rounded(start, calls, tmp_path)
    result = run_pass(reconstructing(calls, calm), model, tmp_path)
    assert len(windows_of(result)) > 1
    assert edges(model) == edges(start)
    unseen = _images(8, seed=100)
    assert outputs_error(model, truth, unseen) < 0.9 * outputs_error(start, truth, unseen)


def _with_activations(model: ir.Model) -> ir.Model:
    """Plan calibrated activations in front of the first three convolutions."""
    ranges = {"one": "[-4.5, 4.5]", "two": "[0.0, 4.0]", "deep": "[0.0, 3.5]"}
    for name, limits in ranges.items():
        node = node_named(model, name)
        node.metadata_props[QUANTIZED_INPUTS] = "[0]"
        value = node.inputs[0]
        assert value is not None
        value.metadata_props.update({QUANTIZER: "uint8:asym", RANGE: limits})
    return model


def test_step_sizes_of_activations_are_learned(tmp_path: Path) -> None:
    insert = (InsertActivationQdq(), InsertQdq())
    calls = _images(16)
    truth, model, start = (
        _net("w8a8:sym"),
        *(_with_activations(_net("w8a8:sym", pair_limit=128)) for _ in range(2)),
    )
    for rewrite in insert:
        run_pass(rewrite, start, tmp_path)
    how = replace(QUICK, start=Start.NEAREST, steps=80, activation_rate=5e-2)
    run_pass(
        ReconstructBlocks(ReconstructBlocksOptions(samples_of(calls), insert, how)), model, tmp_path
    )
    assert edges(model) == edges(start)
    for name in ("x.scale", "r.scale", "s.scale"):
        before, after = initializer(start, name), initializer(model, name)
        assert after.shape == before.shape
        assert after != before
        assert 0.75 * before <= after
        value = node_named(model, {"x": "one", "r": "two", "s": "deep"}[name[0]]).inputs[0]
        while value is not None and RANGE not in value.metadata_props:
            node = value.producer()
            assert node is not None
            value = node.inputs[0]
        assert value is not None
        low, high = json.loads(value.metadata_props[RANGE])
        assert (high - low) / 255 == pytest.approx(float(after), rel=1e-5)
    # Kernels without VNNI saturate on codes that were moved.
    for name in ("w1", "w2", "w3"):
        np.testing.assert_array_equal(
            initializer(model, f"{name}.codes"), initializer(start, f"{name}.codes")
        )
        ratio = initializer(model, f"{name}.scale") / initializer(start, f"{name}.scale")
        assert ratio.min() > 0.749
        assert (ratio != 1).any()
    unseen = _images(8, seed=100)
    assert outputs_error(model, truth, unseen) < outputs_error(start, truth, unseen)


def test_inputs_that_hold_nan_are_refused(tmp_path: Path) -> None:
    calls = [{"x": random_array(4, 3, 12, 12, seed=at)} for at in range(4)]
    calls[1]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match="NaN"):
        run_pass(reconstructing(calls), _net("w4a16:sym"), tmp_path)
