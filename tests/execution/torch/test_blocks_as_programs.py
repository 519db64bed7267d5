"""Layers of real models, each run alone as a program, one after the other."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.execution.sessions import open_session
from qcompiler.execution.torch import Program
from qcompiler.ir.blocks import Block, find_layers
from qcompiler.ir.load import load_model
from qcompiler.ir.shapes import infer_shapes
from tests.support.graphs import build, random_array
from tests.support.real_models import real_model

_OF_WHOLE = 1e-5
_OF_RUNTIME = 1e-4
"""Largest difference of an output, as a part of its largest value: to the whole model as one
program, and to ONNX Runtime, which adds in another order: 2e-5 after 30 layers."""


def _chained(model: ir.Model, layers: list[Block], feeds: dict[str, Any]) -> dict[str, Any]:
    """Run layers one after the other, each from what the one before it gave."""
    at_hand = dict(feeds)
    for layer in layers:
        cut = [layer.input] if layer.input else None
        last = [str(value.name) for value in model.graph.outputs]
        program = Program.from_subgraph(model, cut, [layer.output] if layer.output else last)
        with torch.no_grad():
            results = program({name: at_hand[name] for name in program.input_names})
        at_hand |= results
    return {name: at_hand[name].numpy() for name in last}


def _agrees(model: ir.Model, layers: list[Block], feeds: dict[str, Any]) -> None:
    chained = _chained(model, layers, feeds)
    with torch.no_grad():
        whole = Program.from_subgraph(model)(feeds)
    with open_session(model, optimize=False, threads=1) as session:
        expected = session.run(feeds)
    for name, values in chained.items():
        peak = np.abs(expected[name]).max()
        assert np.abs(values - whole[name].numpy()).max() <= _OF_WHOLE * peak
        assert np.abs(values - expected[name]).max() <= _OF_RUNTIME * peak


def _tokens(length: int) -> dict[str, Any]:
    ids = np.arange(3, 3 + 2 * length, dtype=np.int64).reshape(2, length)
    mask = np.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_layers_of_an_encoder() -> None:
    model = load_model(real_model("minilm"))
    layers = find_layers(model)
    labels = [layer.label for layer in layers if "layer" in layer.label]
    assert labels == [f"model.encoder.layer.{index}" for index in range(6)]
    feeds = _tokens(9)
    if "token_type_ids" in {value.name for value in model.graph.inputs}:
        feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
    _agrees(model, layers, feeds)


def test_layers_of_a_cnn() -> None:
    model = load_model(real_model("cifar_cnn"))
    layers = find_layers(model)
    assert len(layers) == 9  # six convolutions, three dense layers
    (image,) = model.graph.inputs
    shape = [2 if not isinstance(size, int) else size for size in image.shape or ()]
    _agrees(model, layers, {str(image.name): random_array(*shape) * 64 + 128})


@pytest.mark.slow
def test_layers_of_a_decoder() -> None:
    model = load_model(real_model("smollm2_raw"))
    layers = find_layers(model)
    labels = [layer.label for layer in layers if "layers" in layer.label]
    assert labels == [f"model.model.layers.{index}" for index in range(30)]
    assert len(layers) == 32
    _agrees(model, layers, _tokens(16))


def test_layers_of_a_residual_network() -> None:
    weights: dict[str, Any] = {"stem": random_array(8, 3, 3, 3) / 5}
    lines = ["s = Conv<pads = [1, 1, 1, 1]>(x, stem)", "h0 = Relu(s)"]
    for at in range(3):
        weights[f"a{at}"] = random_array(8, 8, 3, 3, seed=at) / 9
        weights[f"b{at}"] = random_array(8, 8, 3, 3, seed=9 + at) / 9
        lines += [
            f"c{at} = Conv<pads = [1, 1, 1, 1]>(h{at}, a{at})",
            f"r{at} = Relu(c{at})",
            f"d{at} = Conv<pads = [1, 1, 1, 1]>(r{at}, b{at})",
            f"e{at} = Add(d{at}, h{at})",
            f"h{at + 1} = Relu(e{at})",
        ]
    lines += ["p = GlobalAveragePool(h3)", "q = Flatten(p)", "y = MatMul(q, head)"]
    weights["head"] = random_array(8, 5)
    text = f"g (float[N, 3, 8, 8] x) => (float[N, 5] y) {{ {' '.join(lines)} }}"
    model = build(text, weights)
    infer_shapes(model)
    layers = find_layers(model)
    assert [layer.output for layer in layers] == ["h0", "h1", "h2", "q", None]
    _agrees(model, layers, {"x": random_array(2, 3, 8, 8)})
