"""A window with its data and its optimizer, made of the graph."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.calibration.calls import Samples
from qcompiler.execution.torch import Program
from qcompiler.execution.torch.element_types import Array
from qcompiler.quant.reconstruction import BlockReconstruction, Compute
from qcompiler.reconstruction.block_stream import BlockStream, open_device, program_from
from qcompiler.reconstruction.joined_calls import Fed, as_tensor, can_join
from qcompiler.reconstruction.losses import LossTerms
from qcompiler.reconstruction.starting_point import CodedWeight, StartingPoint
from qcompiler.reconstruction.trained_steps import TrainedStep
from qcompiler.reconstruction.trained_weights import TrainedWeight
from qcompiler.reconstruction.value_cache import ValueCache
from qcompiler.reconstruction.window_data import Branches, WindowData
from qcompiler.reconstruction.window_training import Trainee, WindowTrainer
from qcompiler.reconstruction.windows import Places, StepSize, Window
from qcompiler.team import Alone, Team

_HELD_OUT: Final = 8
"""One call of so many is not learned from, and judges what was learned."""
_TYPES: Final = {
    Compute.FLOAT32: torch.float32,
    Compute.BFLOAT16: torch.bfloat16,
    Compute.FLOAT16: torch.float16,
}
_FLOATS: Final = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
)


@dataclass(frozen=True, slots=True)
class ReconstructionRun:
    """How a model is gone through.

    Attributes:
        how: What is learned, and how.
        device: Where windows run.
        memory: Bytes of values between blocks that may stay in memory; the others go to disk.
        padding_mask: Name of an input `[batch, tokens]` that is 0 where a token does not count.
        team: Who computes which calls.
    """

    how: BlockReconstruction = field(default_factory=BlockReconstruction)
    device: str = "cpu"
    memory: int = 512 << 20
    padding_mask: str | None = "attention_mask"
    team: Team = field(default_factory=Alone)


class WindowMaker:
    """Goes through the blocks of both graphs, and makes what learns a window.

    Attributes:
        device: Where windows run.
        blocks: What windows are made of.
        places: What is learned where.
    """

    def __init__(
        self, start: StartingPoint, run: ReconstructionRun, caches: tuple[ValueCache, ValueCache]
    ) -> None:
        """Stand at the first block.

        Args:
            start: The graphs.
            run: How.
            caches: Where values between blocks go, of the quantized model and of the float one.
        """
        self._start = start
        self._run = run
        self.device = open_device(run.device)
        self.blocks = start.layers if run.how.layers else start.blocks
        self.places = Places(start, self.blocks)
        self._student = BlockStream(start.model, self.blocks, caches[0], self.device, run.team)
        self._teacher = BlockStream(start.original, self.blocks, caches[1], self.device, run.team)
        self._weights: dict[CodedWeight, TrainedWeight] = {}
        self._steps: dict[str, TrainedStep] = {}

    def read(self, samples: Samples) -> None:
        """Take the calls from their source."""
        self._student.read(samples)
        self._teacher.read(samples)

    def stand_at(self, window: Window) -> None:
        """Run the quantized model to where a window starts, and the float one to its end."""
        while self._student.block.index < window.start:
            self._student.advance()
        while self._teacher.block.index < min(window.stop, len(self.blocks) - 1):
            self._teacher.advance()

    def split(self) -> tuple[list[int], list[int]]:
        """Return the calls to learn from and those that judge; a single call is both."""
        calls = list(range(self._student.calls))
        cut = len(calls) - max(1, len(calls) // _HELD_OUT)
        return (calls[:cut], calls[cut:]) if cut else (calls, calls)

    def _trainee(self, window: Window) -> Trainee:
        """Return the quantized window; what an earlier one learned of it goes on from there."""
        inside = range(window.start, window.stop)
        weights = [self.weight(weight) for weight in self.places.weights(inside)]
        steps = [self.step(step) for step in self.places.step_sizes(inside)]
        names = self._outputs(window)
        # Codes of activations need more bits than the half types have.
        compute = torch.float32 if steps else _TYPES[self._run.how.compute]
        program = self._program(self._start.model, window, compute)

        def parts() -> list[Program]:
            each = (replace(window, start=at, stop=at + 1) for at in inside)
            return [self._program(self._start.model, block, compute) for block in each]

        return Trainee(program, names, weights, steps, compute, parts)

    def trainer(self, window: Window) -> WindowTrainer:
        """Return what learns a window that the blocks were brought to by `stand_at`."""
        how = self._run.how
        trainee = self._trainee(window)
        terms = LossTerms(1.0, how.kl)
        if how.logits and window.stop == len(self.blocks):
            terms = LossTerms(0.0, 1.0)
        data = self._data(window, trainee)
        return WindowTrainer(trainee, data, how, terms, self._run.team)

    def _program(self, model: ir.Model, window: Window, dtype: torch.dtype) -> Program:
        cut = self.blocks[window.start].input
        return program_from(model, cut, self._outputs(window), device=self.device, dtype=dtype)

    def _outputs(self, window: Window) -> tuple[str, ...]:
        """Return the names of what a window is judged by."""
        output = self.blocks[window.stop - 1].output
        if output is not None:
            return (output,)
        outputs = self._start.original.graph.outputs
        return tuple(v.name or "" for v in outputs if v.dtype in _FLOATS)

    def _data(self, window: Window, trainee: Trainee) -> WindowData:
        names = trainee.program.input_names
        targets = self._targets(window)

        cut = self.blocks[window.start].input

        def feeds(call: int) -> Fed:
            kept = self._student.kept(call, names)
            found = {name: _on(self.device, value) for name, value in kept.items()}
            if cut in found:
                # A program converts what has a type in the graph; a cut value may have none.
                found[cut] = as_tensor(found[cut]).to(trainee.compute)
            return found

        def run(given: Fed) -> list[Tensor]:
            return trainee.run(given, *trainee.hard())

        some = [feeds(call) for call in self._student.own[:2]]
        joins = self._run.how.batch > 1 and len(some) > 1 and can_join(run, some)
        tokens = partial(self._student.tokens, name=self._run.padding_mask)
        return WindowData(feeds, targets, tokens, joins=joins)

    def _targets(self, window: Window) -> Callable[[int], Branches]:
        """Return what gives the outputs a window should have in a call, branch by branch."""
        branches = [self._float_outputs(window)]
        if self._run.how.homologous:
            program = self._program(self._start.original, window, torch.float32)
            names = self._outputs(window)

            def own(call: int) -> tuple[Tensor, ...]:
                with torch.no_grad():
                    found = program(self._student.kept(call, program.input_names))
                return tuple(found[name] for name in names)

            branches.append(own)
        return lambda call: tuple(branch(call) for branch in branches)

    def _float_outputs(self, window: Window) -> Callable[[int], tuple[Tensor, ...]]:
        """Return what gives the float model's values at the end of a window."""
        names = self._outputs(window)
        if self.blocks[window.stop - 1].output is not None:

            def kept(call: int) -> tuple[Tensor, ...]:
                found = self._teacher.kept(call, names)
                return tuple(as_tensor(_on(self.device, found[name])) for name in names)

            return kept
        cut = self.blocks[-1].input
        program = program_from(self._start.original, cut, names, device=self.device)

        def computed(call: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                found = program(self._teacher.kept(call, program.input_names))
            return tuple(found[name] for name in names)

        return computed

    def weight(self, weight: CodedWeight) -> TrainedWeight:
        """Return what is learned of a weight, from an earlier window if it was in one."""
        if weight not in self._weights:
            how = self._run.how
            seed = how.seed + self._start.weights.index(weight)
            self._weights[weight] = TrainedWeight(weight, how, self.device, seed)
        return self._weights[weight]

    def step(self, step: StepSize) -> TrainedStep:
        """Return what is learned of a step size, from an earlier window if it was in one."""
        if step.name not in self._steps:
            self._steps[step.name] = TrainedStep(step, self.device)
        return self._steps[step.name]

    def forget(self, weight: CodedWeight) -> TrainedWeight:
        """Return what was learned of a weight for the last time."""
        return self._weights.pop(weight)

    def forget_step(self, step: StepSize) -> TrainedStep:
        """Return what was learned of a step size for the last time."""
        return self._steps.pop(step.name)


def _on(device: torch.device, value: Tensor | Array) -> Tensor | Array:
    return value.to(device) if isinstance(value, Tensor) else value
