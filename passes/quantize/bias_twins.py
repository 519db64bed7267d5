"""The float and the quantized form of a model, run side by side level by level."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.channel_means import ErrorSums, padding_inputs, rows_that_count
from qcompiler.calibration.held_out import hold_out
from qcompiler.ir.dataflow import is_op
from qcompiler.ir.linear_ops import LinearOp
from qcompiler.ir.weights import read_all
from qcompiler.passes.quantize.bias_levels import LevelledModel, Shift, wide
from qcompiler.passes.quantize.bias_shelf import Shelf
from qcompiler.progress import Advance

Array = npt.NDArray[Any]

_LEAST: Final = 1e-30
"""Stands for no noise, or no signal, where a logarithm is taken."""


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How errors are measured.

    Attributes:
        samples: The calls; the last quarter judges corrections, the others make them.
        scratch: Where files go.
        memory_budget: Bytes the process may take.
        threads: Threads of one operator.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    samples: Samples
    scratch: Path
    memory_budget: int
    threads: int
    custom_op_libraries: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """One call, whose inputs are on a shelf.

    Attributes:
        chooses: Whether it makes corrections.
        judges: Whether it judges them; a single call does both.
        masks: Its inputs that say which tokens are padding.
    """

    chooses: bool
    judges: bool
    masks: Feeds


def calls_on(shelf: Shelf, model: ir.Model, samples: Samples) -> list[Call]:
    """Put the inputs of all calls on a shelf, under their names."""
    masks = padding_inputs(model, samples)
    choosing, judging = hold_out(samples)
    first = len(samples) - len(judging)
    defaults = {
        value.name or "": read_all(value.const_value)
        for value in model.graph.inputs
        if value.const_value is not None
    }
    calls = []
    for index, feeds in enumerate(samples):
        for name, values in (defaults | feeds).items():
            shelf.put(name, index, wide(values))
        kept = {name: feeds[name] for name in masks}
        calls.append(Call(index < len(choosing), index >= first, kept))
    return calls


class Twins:
    """Both forms of a model.

    Args:
        model: The float model.
        quantized: The same with Q/DQ nodes; values have kept their names.
        levels: Names of the values of each level.
        shelf: Where the inputs of the calls are.
        calls: The calls.
        options: How to run them.

    Attributes:
        quantized: The quantized form, whose values may be shifted.
        axes: The axis of channels of each value whose errors were measured.
    """

    def __init__(
        self,
        model: ir.Model,
        quantized: ir.Model,
        levels: Sequence[Sequence[str]],
        shelf: Shelf,
        calls: Sequence[Call],
        options: MeasureOptions,
    ) -> None:
        self._calls = calls
        self._float, self.quantized = (
            LevelledModel(
                each,
                levels,
                shelf,
                len(calls),
                label=label,
                threads=options.threads,
                custom_op_libraries=options.custom_op_libraries,
            )
            for label, each in (("float", model), ("quantized", quantized))
        )
        self.axes: dict[str, int] = {}

    @property
    def obstacle(self) -> str | None:
        """Name of a value that lies between two levels and cannot be kept; None without one."""
        return self._float.obstacle or self.quantized.obstacle

    def errors(
        self, index: int, ops: Mapping[str, LinearOp], advance: Advance
    ) -> dict[str, tuple[ErrorSums, ErrorSums]]:
        """Run one level, and return the errors on the calls that choose and on those that judge.

        Args:
            index: Of the level; those before it have been run.
            ops: The op that gives each value of the level.
            advance: Told of each call.
        """
        sums = {
            name: (ErrorSums(op.channels_out), ErrorSums(op.channels_out))
            for name, op in ops.items()
        }
        with ExitStack() as stack:
            runs = [stack.enter_context(m.level(index)) for m in (self._float, self.quantized)]
            for number, call in enumerate(self._calls):
                truth, found = (run(number) for run in runs)
                parts = (call.chooses, call.judges)
                for name, op in ops.items():
                    axis = 1 if is_op(op.node, "Conv", "ConvTranspose") else truth[name].ndim - 1
                    self.axes[name] = axis
                    counts = rows_that_count(call.masks, truth[name].shape, axis)
                    for each, takes_part in zip(sums[name], parts, strict=True):
                        if takes_part:
                            each.add(truth[name], found[name], axis, counts)
                advance(1)
        return sums

    def noises(self, index: int, trials: Sequence[Mapping[str, Shift]] = ({},)) -> list[float]:
        """Return the noise of a level on the calls that judge, in dB, a mean over these calls.

        That of a call is the sum over the level's values of noise over signal. A mean of decibels
        is not decided by the one call that is worst by far, such as one with values beyond the
        calibrated ranges, in which nothing that is done to biases matters.

        Args:
            index: Of the level; those before it have been run.
            trials: What values of the level before it are shifted by, one trial after the other.
        """
        totals = np.zeros(len(trials))
        judging = [number for number, call in enumerate(self._calls) if call.judges]
        with ExitStack() as stack:
            run_float, run_quantized = (
                stack.enter_context(m.level(index, keep=False))
                for m in (self._float, self.quantized)
            )
            for number in judging:
                truth = run_float(number)
                for trial, shifts in enumerate(trials):
                    with self.quantized.shifted(index - 1, shifts):
                        found = run_quantized(number)
                    masks = self._calls[number].masks
                    noise = sum(_noise(truth[name], found[name], masks) for name in truth)
                    totals[trial] += 10 * np.log10(max(noise, _LEAST))
        return [float(total) / max(1, len(judging)) for total in totals]


def _noise(truth: Array, found: Array, masks: Feeds) -> float:
    """Return the energy of the error over that of the value, padding left out.

    What is infinite or NaN in the float model, such as a masked logit, does not count either.
    """
    counts = rows_that_count(masks, truth.shape, truth.ndim - 1)
    if counts is not None:
        truth, found = truth[counts], found[counts]
    finite = np.isfinite(truth)
    true = truth[finite].astype(np.float64)
    signal = float(np.square(true).sum())
    return float(np.square(found[finite].astype(np.float64) - true).sum()) / max(signal, _LEAST)
