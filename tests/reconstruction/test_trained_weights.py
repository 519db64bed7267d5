"""Codes and step sizes as numbers that can be learned."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qcompiler.ir.provenance import annotate
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.quant.reconstruction import BlockReconstruction, Learned, Rounding
from qcompiler.reconstruction.starting_point import CodedWeight, quantize_to_start
from qcompiler.reconstruction.trained_weights import TrainedWeight
from qcompiler.rewriting.base import PassContext
from tests.support.graphs import build, node_named, random_array
from tests.support.parity import run_model

CPU = torch.device("cpu")


def _coded(scheme: str, folder: Path) -> tuple[CodedWeight, np.ndarray]:
    """Return a weight, and what its codes stand for by the runtime."""
    text = "g (float[N, 40] x) => (float[N, 24] y) { [op] y = MatMul(x, w) }"
    model = build(text, {"w": random_array(40, 24)}, opset=25)
    annotate(node_named(model, "op"), scheme=scheme)
    start = quantize_to_start(model, (InsertQdq(),), PassContext(WeightStore(folder)))
    values = run_model(model, {"x": np.eye(40, dtype=np.float32)})["y"]
    return start.weights[0], values


@pytest.mark.parametrize("scheme", ["w2a16:b16:asym", "w3a16:sym", "w4a16:b32:sym", "w8a16:asym"])
@pytest.mark.parametrize("learned", list(Learned))
def test_it_starts_as_the_graph_has_it(scheme: str, learned: Learned, tmp_path: Path) -> None:
    weight, values = _coded(scheme, tmp_path)
    trained = TrainedWeight(weight, BlockReconstruction(learned=learned), CPU, 0)
    for found in (trained.values().detach(), trained.hard_values()):
        np.testing.assert_allclose(found.numpy(), values, rtol=1e-6, atol=1e-7)
    hardened = trained.harden()
    assert (hardened.flipped, hardened.moved) == (0, 0)


@pytest.mark.parametrize("learned", [Learned.LORA, Learned.FULL])
def test_soft_codes_start_as_the_float_weight_and_harden_to_the_start(
    learned: Learned, tmp_path: Path
) -> None:
    weight, values = _coded("w4a16:b16:asym", tmp_path)
    how = BlockReconstruction(learned=learned, rounding=Rounding.SOFT)
    trained = TrainedWeight(weight, how, CPU, 0)
    error = np.abs(trained.values().detach().numpy() - random_array(40, 24))
    assert np.median(error) < 0.1 * np.median(np.abs(values - random_array(40, 24)))
    assert trained.harden().flipped == 0
    penalty = trained.regularizer(2.0)
    assert penalty is not None
    assert 0 < float(penalty.detach()) < trained.size


def test_gradients_are_those_of_rounding_straight_through(tmp_path: Path) -> None:
    weight, _ = _coded("w4a16:b16:asym", tmp_path)
    trained = TrainedWeight(weight, BlockReconstruction(), CPU, 0)
    direction = torch.from_numpy(random_array(40, 24, seed=2))
    values = trained.values()
    torch.autograd.backward((values * direction).sum())
    scale = trained.scale().detach()
    spread = scale.repeat_interleave(16, 0)[:40]
    torch.testing.assert_close(trained.matrices[0].grad, direction * spread)
    # The value is proportional to its scale, whose logarithm is learned.
    expected = torch.stack(
        [(direction * values.detach())[at : at + 16].sum(0) for at in (0, 16, 32)]
    )
    torch.testing.assert_close(trained.factors.grad, expected, rtol=1e-4, atol=1e-5)


def test_positions_stay_in_the_range_of_codes(tmp_path: Path) -> None:
    weight, _ = _coded("w2a16:b16:asym", tmp_path)
    trained = TrainedWeight(weight, BlockReconstruction(), CPU, 0)
    with torch.no_grad():
        trained.matrices[0].add_(100)
    trained.confine()
    assert float(trained.matrices[0].detach().max()) == 3.5
    assert trained.harden().codes.max() == 3


def test_what_was_learned_can_be_taken_back(tmp_path: Path) -> None:
    weight, values = _coded("w4a16:b16:asym", tmp_path)
    trained = TrainedWeight(weight, BlockReconstruction(learned=Learned.LORA), CPU, 0)
    state = trained.state()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    assert trained.harden().moved == trained.factors.numel()
    trained.restore(state)
    np.testing.assert_allclose(trained.hard_values().numpy(), values, rtol=1e-6, atol=1e-7)
