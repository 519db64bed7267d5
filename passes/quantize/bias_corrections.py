"""Measures what quantization adds to the mean of each output channel, op by op.

A correction has to hold on held-out calls in three places: it must make the mean squared error of
the op's own result smaller, not make the noise of the next results worse that depend on it, and
not be one of corrections that together make the outputs worse. The first alone is not enough: the
mean over all rows says little of the few rows on which an activation function lets a channel
through. In MiniLM (w4a16, one scale per channel) corrections that each pass the first test take
the output from 9.9 to 4.7 dB, and those that also pass the second to 10.6 dB.

Means are taken as they are. To shrink them by their standard errors over images or texts, or to
drop those below two of these, changed the outputs of MiniLM and the CIFAR CNN by -0.2 to +0.3 dB
with 2 to 4 calls and by -0.7 to 0.0 dB with 16 to 20: the tests do that work already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.candidates import float_outputs
from qcompiler.calibration.channel_means import ErrorSums
from qcompiler.ir.editing import values_of
from qcompiler.ir.linear_ops import LinearOp
from qcompiler.passes.quantize.bias_levels import Shift, levels_of
from qcompiler.passes.quantize.bias_shelf import Shelf
from qcompiler.passes.quantize.bias_twins import MeasureOptions, Twins, calls_on
from qcompiler.progress import Progress
from qcompiler.quant.ranges import sqnr_db

F64 = npt.NDArray[np.float64]

_SHARE = 4
"""One part in so many of the memory budget is for values that wait between levels."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What is to be added to a bias, and what that does on held-out calls.

    Attributes:
        bias: float64 `[channels]`, the new bias, as its type holds it.
        shift: float64 `[channels]`, new minus old bias.
        before: Mean squared error of the op's result, with what is before it corrected.
        after: The same with the correction of this op.
        signal: Mean square of the result.
        bias_before: Root mean square, over channels, of the mean error.
        bias_after: The same with the correction.
        objection: Why it is not made, "" if it is.
    """

    bias: F64
    shift: F64
    before: float
    after: float
    signal: float
    bias_before: float
    bias_after: float
    objection: str = ""

    @property
    def decibels(self) -> str:
        """SQNR of the result without and with the correction."""
        before, after = (sqnr_db(self.signal, error) for error in (self.before, self.after))
        return f"{before:.2f} -> {after:.2f}"


def measure_corrections(
    model: ir.Model,
    quantized: ir.Model,
    ops: Sequence[LinearOp],
    options: MeasureOptions,
    progress: Progress,
) -> list[Correction | str]:
    """Return the correction of each op, with those before it in effect that nothing speaks against.

    Args:
        model: The float model.
        quantized: The same with Q/DQ nodes; values have kept their names, or lost them.
        ops: Ops of the main graph.
        options: How.
        progress: Shows the task "correcting biases".

    Returns:
        For each op its correction, or why it has none.

    Raises:
        TargetError: ONNX Runtime cannot run a model on a sample.
    """
    kept = {value.name for value in values_of(quantized.graph)}
    of = {op.output.name or "": op for op in ops if op.output.name in kept}
    outputs = [value for value in float_outputs(model) if value.producer() is not None]
    levels = [*levels_of(model.graph, [op.output for op in of.values()]), outputs]
    names = [[value.name or "" for value in level] for level in levels]
    with Shelf(options.scratch, options.memory_budget // _SHARE) as shelf:
        calls = calls_on(shelf, model, options.samples)
        twins = Twins(model, quantized, names, shelf, calls, options)
        if twins.obstacle is not None:
            reason = f"{twins.obstacle}, between ops with biases, is not known to hold numbers"
            return [reason] * len(ops)
        found: dict[str, Correction | str] = {}
        with progress.task("correcting biases", len(names[:-1]) * len(calls)) as advance:
            for index, level in enumerate(names[:-1]):
                errors = twins.errors(index, {name: of[name] for name in level}, advance)
                found |= {name: _correction(of[name], *errors[name]) for name in level}
                _judge_by_next(index, level, found, twins)
        plain = Twins(model, quantized, names[-1:], shelf, calls, options)
        (before,), (after,) = plain.noises(0), twins.noises(len(names) - 1)
    lost = "its result is not a value of the quantized graph"
    return [_judged_by_outputs(found.get(op.output.name or "", lost), before, after) for op in ops]


def _correction(op: LinearOp, choosing: ErrorSums, judging: ErrorSums) -> Correction | str:
    if not choosing.rows or not judging.rows:
        return "no sample gives it a row"
    if not np.isfinite(choosing.error).all() or not np.isfinite(judging.squares).all():
        return "its result is not finite on some sample"
    old = op.read_bias()
    bias = (old - choosing.mean).astype(op.tensor.dtype.numpy()).astype(np.float64)
    shift = bias - old
    before, after = judging.mean_square(), judging.mean_square(shift)
    objection = ""
    if not after < before:
        objection = (
            "a corrected bias does not make the held-out error of its result smaller: mean "
            f"squared error {before:.4g} without, {after:.4g} with it"
        )
    return Correction(
        bias,
        shift,
        before,
        after,
        judging.mean_signal,
        _root_mean_square(judging.mean),
        _root_mean_square(judging.mean + shift),
        objection,
    )


def _judge_by_next(
    index: int, level: Sequence[str], found: dict[str, Correction | str], twins: Twins
) -> None:
    """Try each correction of a level on what comes next, and put those in effect that hold."""
    tried: Mapping[str, Correction] = {
        name: c for name in level if isinstance(c := found[name], Correction) and not c.objection
    }
    if not tried:
        return
    shifts = {name: Shift(twins.axes[name], c.shift) for name, c in tried.items()}
    alone = [{name: shift} for name, shift in shifts.items()]
    before, *noises = twins.noises(index + 1, [{}, *alone])
    for (name, correction), after in zip(tried.items(), noises, strict=True):
        if not after <= before:
            del shifts[name]
            objection = (
                "a corrected bias makes the held-out noise of the results that depend on its own "
                f"larger: {before:.2f} dB without, {after:.2f} dB with it"
            )
            found[name] = replace(correction, objection=objection)
    twins.quantized.shift(index, shifts)


def _judged_by_outputs(
    correction: Correction | str, before: float, after: float
) -> Correction | str:
    if isinstance(correction, str) or correction.objection or after <= before:
        return correction
    objection = (
        "all corrections together make the held-out noise of the outputs larger: "
        f"{before:.2f} dB without, {after:.2f} dB with them"
    )
    return replace(correction, objection=objection)


def _root_mean_square(values: F64) -> float:
    return float(np.sqrt(np.square(values).mean()))
