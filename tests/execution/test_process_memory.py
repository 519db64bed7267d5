from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import TargetError
from qcompiler.execution.process_memory import memory_to_run, peak_memory
from tests.support.graphs import build, random_array

_MIB = 1 << 20


def _model(folder: Path, size: int) -> Path:
    weight = random_array(size, size)
    text = f"m (float[1, {size}] x) => (float[1, {size}] y) {{ y = MatMul(x, w) }}"
    path = folder / f"{size}.onnx"
    ir.save(build(text, {"w": weight}), path)
    return path


def test_a_model_takes_at_least_its_weights(tmp_path: Path) -> None:
    feeds = {size: {"x": np.ones((1, size), np.float32)} for size in (64, 2048)}
    small = memory_to_run(_model(tmp_path, 64), feeds[64], threads=1)
    large = memory_to_run(_model(tmp_path, 2048), feeds[2048], threads=1)
    assert small < 12 * _MIB
    assert 16 * _MIB < large < 80 * _MIB


def test_a_model_that_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    with pytest.raises(TargetError, match="the process that measures memory failed"):
        memory_to_run(tmp_path / "no.onnx", {})


def test_this_process() -> None:
    assert peak_memory() > 20 * _MIB
