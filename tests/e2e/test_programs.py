"""Real models, float and compiled, as PyTorch programs: what ONNX Runtime gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.models import cifar_cnn, silero_vad
from qcompiler import CompileOptions, compile_model
from qcompiler.execution.sessions import open_session
from qcompiler.execution.torch import Program
from qcompiler.ir.load import load_model
from tests.support.graphs import random_array
from tests.support.real_models import real_model

_TOLERANCE = 1e-5
"""Largest difference of an output, as a part of its largest value."""


def _agrees(path: Path, feeds: dict[str, Any]) -> None:
    program = Program.from_subgraph(load_model(path))
    assert program.outside_torch == ()
    with torch.no_grad():
        results = program(feeds)
    with open_session(path, optimize=False, threads=1) as session:
        expected = session.run(feeds)
    for name, values in expected.items():
        peak = np.abs(values).max()
        assert np.abs(results[name].numpy() - values).max() <= _TOLERANCE * peak, name


@pytest.mark.parametrize("variant", silero_vad.VARIANTS)
def test_speech_with_state_and_branches(variant: silero_vad.Variant) -> None:
    name = "silero_vad" if variant == "vad" else f"silero_vad_{variant}"
    path = real_model(name)
    _agrees(path, silero_vad.sample_feeds(3, variant)[-1])


@pytest.mark.parametrize("scheme", ["w4a16:b32", "w8a16", "w8a8-dynamic"])
def test_what_the_compiler_wrote(scheme: str, tmp_path: Path) -> None:
    output = tmp_path / "compiled.onnx"
    compile_model(real_model(cifar_cnn.NAME), CompileOptions(scheme=scheme), output=output)
    (image,) = load_model(output).graph.inputs
    shape = [2 if not isinstance(size, int) else size for size in image.shape or ()]
    _agrees(output, {str(image.name): random_array(*shape) * 64 + 128})
