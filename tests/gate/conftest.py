"""A small model, what was made of it, and data to judge on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.compile import compile_model
from qcompiler.options import CalibrationOptions, CompileOptions
from tests.support.graphs import build, random_array
from tests.support.parity import run_model

TEXT = """
net (float[batch, 16] x) => (float[batch, 8] logits) {
    a = MatMul(x, w1)
    b = Relu(a)
    c = MatMul(b, w2)
    d = Relu(c)
    e = MatMul(d, w3)
    f = Relu(e)
    logits = MatMul(f, w4)
}
"""
SHAPES = {"w1": (16, 64), "w2": (64, 64), "w3": (64, 64), "w4": (64, 8)}


@dataclass(frozen=True, slots=True)
class Files:
    """Where things are.

    Attributes:
        base: The float model.
        good: It in w8a8.
        data: 60 samples with the float model's own answers as labels.
    """

    base: Path
    good: Path
    data: Path

    def changed(self, weight: str, name: str, source: Path | None = None) -> Path:
        """Write a model with the elements of one weight in another order."""
        model = ir.load(source or self.good)
        value = model.graph.initializers[weight]
        assert value.const_value is not None
        values = value.const_value.numpy().copy()
        np.random.default_rng(0).shuffle(values.reshape(-1))
        value.const_value = ir.tensor(values, name=weight)
        path = self.base.with_name(name)
        ir.save(model, path)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("gate")
    weights = {
        name: random_array(*shape, seed=seed) * np.float32(np.sqrt(2 / shape[0]))
        for seed, (name, shape) in enumerate(SHAPES.items())
    }
    model = build(TEXT, weights)
    for node, name in zip(
        model.graph, ["one", "r1", "two", "r2", "three", "r3", "four"], strict=True
    ):
        node.name = name
    base = folder / "base.onnx"
    ir.save(model, base)
    rows = random_array(60, 16, seed=9)
    label = run_model(model, {"x": rows})["logits"].argmax(1)
    np.savez(folder / "test.npz", x=rows, label=label)
    np.savez(folder / "calibration.npz", x=random_array(64, 16, seed=8))
    calibration = CalibrationOptions(str(folder / "calibration.npz"))
    options = CompileOptions(calibration=calibration, never_slower=False, inspect_kernels=False)
    good = compile_model(base, options, output=folder / "good.onnx").path
    return Files(base, good, folder / "test.npz")
