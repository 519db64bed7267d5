"""A small model of which one op suffers from 8-bit activations, ready to be quantized."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.observers import Observer
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CalibrationOptions, CompileOptions, EqualizationOptions
from qcompiler.pipeline import pipeline
from qcompiler.plan import CalibrationData, Plan, make_plan
from qcompiler.rewriting.base import PassContext
from tests.support.graphs import build, random_array

WIDTH = 64
SENSITIVE = "second"
OPS = ("first", SENSITIVE, "third", "last")


def sensitive_model() -> ir.Model:
    """Return `y`, float, and `p`, probabilities; one channel that "second" ignores is 300-fold."""
    gain = np.ones(WIDTH, np.float32)
    gain[3] = 300
    second = random_array(WIDTH, WIDTH, seed=2)
    second[3] = 0
    return build(
        f"""g (float[N, {WIDTH}] x) => (float[N, {WIDTH}] y, float[N, 8] p) {{
            [first] a = MatMul(x, w1)
            [gain] b = Mul(a, gain)
            [second] c = MatMul(b, w2)
            [tanh] d = Tanh(c)
            [third] e = MatMul(d, w3)
            [sum] y = Add(e, x)
            [last] f = MatMul(y, w4)
            [softmax] p = Softmax(f) }}""",
        {
            "w1": random_array(WIDTH, WIDTH, seed=1),
            "gain": gain,
            "w2": second / 8,
            "w3": random_array(WIDTH, WIDTH, seed=3),
            "w4": random_array(WIDTH, 8, seed=4) / 8,
        },
    )


def calls(count: int, rows: int = 16) -> Samples:
    """Return calls with normal inputs, each with its own."""

    def read() -> Iterator[Feeds]:
        for index in range(count):
            yield {"x": random_array(rows + index, WIDTH, seed=100 + index)}

    return Samples(f"{count} calls", False, count, read)


def planned(count: int = 4, **options: object) -> tuple[ir.Model, Plan]:
    """Return the model with schemes, quantizers and ranges, and the plan it was made by."""
    calibration = CalibrationOptions(
        "random", observer=Observer.MIN_MAX, outlier_channels=0, two_terms_below=0
    )
    settings = {
        "scheme": "w8a8",
        "calibration": calibration,
        "never_slower": False,
        "equalization": EqualizationOptions(None),
        **options,
    }
    plan = make_plan(CompileOptions(**settings))  # type: ignore[arg-type]
    plan = replace(plan, data=CalibrationData(calls(count), lambda: ""))
    model = sensitive_model()
    for rewrite in pipeline(plan):
        rewrite.run(model, context(Path()))
        if rewrite.name == "calibrate":
            break
    return model, plan


def context(folder: Path) -> PassContext:
    """Return what passes need; tensors stay in memory."""
    return PassContext(WeightStore(folder, spill_bytes=1 << 40), workers=1)
