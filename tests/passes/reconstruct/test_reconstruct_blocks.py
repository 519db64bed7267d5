"""Codes and step sizes that are learned over windows, in the graph that insert-qdq makes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from qcompiler.calibration.calls import Feeds
from qcompiler.errors import ModelError, UsageError
from qcompiler.ir.provenance import QUANTIZED_INPUTS, QUANTIZER, RANGE, annotate, facts_of
from qcompiler.passes.quantize.insert_activation_qdq import InsertActivationQdq
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.passes.reconstruct.reconstruct_blocks import (
    ReconstructBlocks,
    ReconstructBlocksOptions,
)
from qcompiler.passes.reconstruct.round_weights import RoundWeights, RoundWeightsOptions
from qcompiler.quant.reconstruction import (
    BlockReconstruction,
    Compute,
    Learned,
    Rounding,
    Start,
)
from qcompiler.reconstruction.starting_point import edges
from qcompiler.reconstruction.window_training import WindowTrainer
from qcompiler.rewriting.base import PassResult
from qcompiler.rewriting.window_record import WindowRewrite
from tests.support.graphs import build, initializer, node_named, random_array, serialized
from tests.support.parity import run_model
from tests.support.reconstruction import decoder, samples_of, token_calls
from tests.support.rewrites import assert_idempotent, reasons, run_pass

Array = npt.NDArray[Any]
QUICK = BlockReconstruction(steps=40, batch=2, scale_rate=1e-2, code_rate=2e-2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _planned(scheme: str = "w2a16:b16:asym", layers: int = 3, *, head: bool = False) -> ir.Model:
    text, weights = decoder(layers)
    model = build(text, weights, opset=25)
    for node in model.graph:
        if node.op_type == "MatMul" and node.name and (head or node.name != "head"):
            annotate(node, scheme=scheme)
    return model


def _pass(calls: Sequence[Feeds], how: BlockReconstruction = QUICK, **options: Any) -> ReconstructBlocks:
    given = ReconstructBlocksOptions(samples_of(calls), (InsertQdq(),), how, **options)
    return ReconstructBlocks(given)


def _windows(result: PassResult) -> list[WindowRewrite]:
    return [record for record in result.rewrites if isinstance(record, WindowRewrite)]


def _error(model: ir.Model, truth: ir.Model, calls: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean squared error of the outputs over their mean square."""
    found = error = 0.0
    for feeds in calls:
        expected = next(iter(run_model(truth, feeds).values())).astype(np.float64)
        error += float(np.square(next(iter(run_model(model, feeds).values())) - expected).sum())
        found += float(np.square(expected).sum())
    return error / found


def _rounded(model: ir.Model, calls: Sequence[Feeds], folder: Path) -> ir.Model:
    run_pass(RoundWeights(RoundWeightsOptions(samples_of(calls), (InsertQdq(),))), model, folder)
    return model


def test_outputs_are_nearer_than_those_of_gptq_with_the_same_nodes(tmp_path: Path) -> None:
    calls = token_calls(20)
    unseen = token_calls(26)[20:]
    truth, model = _planned(), _planned()
    start = _rounded(_planned(), calls, tmp_path)
    result = run_pass(_pass(calls), model, tmp_path)
    assert edges(model) == edges(start)
    windows = _windows(result)
    assert [w.window for w in windows] == [0, 1]
    for window in windows:
        assert window.kept
        assert window.loss_after < 0.9 * window.loss_before
        assert 0 < window.flipped < window.codes
        assert window.seconds > 0
        assert window.peak_bytes > 0
    assert _error(model, truth, unseen) < 0.8 * _error(start, truth, unseen)
