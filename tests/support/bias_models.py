"""Models with biases, quantized by rounding weights alone, and what it does to their means."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.held_out import hold_out
from qcompiler.execution.intermediates import values_at
from qcompiler.passes.quantize.correct_bias import CorrectBias, CorrectBiasOptions
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.rewriting.base import Pass
from qcompiler.targets.capability import Target
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from tests.support.graphs import build, random_array
from tests.support.rewrites import run_pass

Array = npt.NDArray[Any]


def samples(calls: Sequence[Feeds]) -> Samples:
    """Return calls as samples."""

    def read() -> Iterator[Feeds]:
        return iter(calls)

    return Samples("a test", False, len(calls), read)


def shifted_rows(count: int, *shape: int, seed: int = 0) -> list[Feeds]:
    """Return calls whose input `x` has a mean, so that rounding errors of weights have one."""
    mean = 1.5 + random_array(shape[-1], seed=9)
    return [{"x": random_array(*shape, seed=seed + call) + mean} for call in range(count)]


def planned(
    text: str, weights: Mapping[str, Any], scheme: str = "w4a16:sym", *, opset: int = 21
) -> ir.Model:
    """Return a model whose nodes with a name that begins with "op" have a scheme."""
    model = build(text, weights, opset=opset)
    for node in model.graph.all_nodes():
        if (node.name or "").startswith("op"):
            node.metadata_props["qcompiler.scheme"] = scheme
    return model


def gemms(scheme: str = "w4a16:sym", *, half: bool = False) -> ir.Model:
    """Return three Gemms with a Relu between; the second has beta 2, the third no bias."""
    kind, dtype = ("float16", np.float16) if half else ("float", np.float32)
    return planned(
        f"""g ({kind}[n, 32] x) => ({kind}[n, 16] y) {{
            [op1] a = Gemm(x, w1, b1)
            b = Relu(a)
            [op2] c = Gemm<beta=2.0, transB=1>(b, w2, b2)
            d = Relu(c)
            [op3] y = Gemm(d, w3) }}""",
        {
            "w1": (random_array(32, 48, seed=1) / 6).astype(dtype),
            "b1": random_array(48, seed=2).astype(dtype),
            "w2": (random_array(48, 48, seed=3) / 7).astype(dtype),
            "b2": random_array(48, seed=4).astype(dtype),
            "w3": (random_array(48, 16, seed=5) / 7).astype(dtype),
        },
        scheme,
    )


def correct_bias(
    calls: Sequence[Feeds],
    quantize: tuple[Pass, ...] = (InsertQdq(),),
    target: Target = ONNXRUNTIME,
    memory_budget: int = 1 << 30,
) -> CorrectBias:
    """Return the pass."""
    return CorrectBias(CorrectBiasOptions(samples(calls), quantize, target, memory_budget))


def quantized(
    model: ir.Model, folder: Path, quantize: tuple[Pass, ...] = (InsertQdq(),)
) -> ir.Model:
    """Return a quantized copy of a planned model."""
    copy = model.clone()
    for rewrite in quantize:
        run_pass(rewrite, copy, folder)
    return copy


def errors_at(
    truth: ir.Model, found: ir.Model, name: str, calls: Sequence[Feeds], axis: int = -1
) -> Array:
    """Return the errors of a value on some calls, `[rows, channels]`."""
    rows = []
    for feeds in calls:
        one, other = (values_at(model, [name], feeds)[name] for model in (truth, found))
        error = np.moveaxis(other.astype(np.float64) - one.astype(np.float64), axis, -1)
        rows.append(error.reshape(-1, error.shape[-1]))
    return np.concatenate(rows)


def parts(calls: Sequence[Feeds]) -> tuple[list[Feeds], list[Feeds]]:
    """Return the calls that make corrections, and those that judge them."""
    choosing, judging = hold_out(samples(calls))
    return list(choosing), list(judging)
