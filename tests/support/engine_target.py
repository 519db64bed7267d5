"""A target with engines, whose table is that of ONNX Runtime, for tests of what builds them."""

from dataclasses import replace
from typing import Final

import pytest

from qcompiler import plan
from qcompiler.targets.capability import Target
from qcompiler.targets.onnxruntime import ONNXRUNTIME

ENGINE_TARGET: Final = replace(
    ONNXRUNTIME,
    name="engines",
    title="TensorRT-RTX",
    rows=tuple(replace(row, symmetric=(True,), ragged=False) for row in ONNXRUNTIME.rows),
    lowering=(),
    engine="tensorrt-rtx",
)


@pytest.fixture
def engine_target(monkeypatch: pytest.MonkeyPatch) -> Target:
    """The target, under any name that is asked for."""
    monkeypatch.setattr(plan, "find_target", lambda name: ENGINE_TARGET)
    return ENGINE_TARGET
