"""Learning codes and step sizes of a Q/DQ graph, window by window (CBQ)."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.calibration.calls import Samples
from qcompiler.execution.torch import Program
from qcompiler.execution.torch.element_types import Array
from qcompiler.ir.weights import WeightStore
from qcompiler.progress import Advance, Progress
from qcompiler.quant.reconstruction import BlockReconstruction, Compute
from qcompiler.reconstruction.block_stream import BlockStream, open_device, program_from
from qcompiler.reconstruction.checkpoint import Arrays, Checkpoint
from qcompiler.reconstruction.losses import LossTerms
from qcompiler.reconstruction.peak import forget_peak, peak_of
from qcompiler.reconstruction.starting_point import CodedWeight, StartingPoint
from qcompiler.reconstruction.trained import Trained
from qcompiler.reconstruction.trained_steps import TrainedStep
from qcompiler.reconstruction.trained_weights import TrainedWeight
from qcompiler.reconstruction.value_cache import ValueCache
from qcompiler.reconstruction.window_data import Branches, Fed, WindowData, can_join
from qcompiler.reconstruction.window_training import (
    Trainee,
    WindowTrainer,
    improves,
)
from qcompiler.reconstruction.windows import Places, StepSize, Window, cut_windows
from qcompiler.reconstruction.writing import note_quality, put_array, put_contents
from qcompiler.rewriting.base import Rewrite, Skip
from qcompiler.rewriting.window_record import WindowRewrite

RULE: Final = "reconstruct-blocks"
_HELD_OUT: Final = 8
"""One call of so many is not learned from, and judges what was learned."""


@dataclass(frozen=True, slots=True)
class ReconstructionRun:
    """How a model is gone through.

    Attributes:
        how: What is learned, and how.
        device: Where windows run.
        memory: Bytes of values between blocks that may stay in memory; the others go to disk.
        padding_mask: Name of an input `[batch, tokens]` that is 0 where a token does not count.
    """

    how: BlockReconstruction = field(default_factory=BlockReconstruction)
    device: str = "cpu"
    memory: int = 512 << 20
    padding_mask: str | None = "attention_mask"


def reconstruct_model(
    start: StartingPoint,
    samples: Samples,
    run: ReconstructionRun,
    store: WeightStore,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
) -> list[Rewrite | Skip]:
    """Learn window by window, and write what was learned into the graph's initializers.

    Args:
        start: The graph, with the codes to begin with.
        samples: The calls.
        run: How.
        store: Where new codes go.
        progress: Where it is shown.
        checkpoint: Where finished windows are kept, and those that are there taken from.

    Returns:
        A `WindowRewrite` for each window, in order; a skip for each that was left as it was, and
        for each weight that is not learned.

    Raises:
        ModelError: No gradient passes through a window.
        UsageError: The device cannot be used, memory does not suffice for one call, windows do
            not move on, or the disk is full.
    """
    with (
        ValueCache(store.directory, run.memory // 2) as cache,
        ValueCache(store.directory, run.memory // 2) as float_cache,
    ):
        reconstruction = _Reconstruction(
            start, samples, run, store, (cache, float_cache), checkpoint
        )
        return [*reconstruction.run(progress), *reconstruction.skips()]


class _Reconstruction:
    """One run over a model."""

    def __init__(
        self,
        start: StartingPoint,
        samples: Samples,
        run: ReconstructionRun,
        store: WeightStore,
        caches: tuple[ValueCache, ValueCache],
        checkpoint: Checkpoint | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._start = start
        self._run = run
        self._store = store
        self._device = open_device(run.device)
        self._blocks = start.layers if run.how.layers else start.blocks
        self._places = Places(start, self._blocks)
        self._windows = self._cut()
        self._student = BlockStream(start.model, self._blocks, caches[0], self._device)
        self._teacher = BlockStream(start.original, self._blocks, caches[1], self._device)
        self._weights: dict[CodedWeight, TrainedWeight] = {}
        self._steps: dict[str, TrainedStep] = {}
        if self._windows:
            self._student.read(samples)
            self._teacher.read(samples)

    def _cut(self) -> list[Window]:
        span = self._places.span()
        if span is None:
            return []
        first, last = span
        if self._run.how.logits:
            last = len(self._blocks) - 1
        return cut_windows(first, last, self._run.how.window, self._run.how.overlap)

    def run(self, progress: Progress) -> list[Rewrite | Skip]:
        """Go through all windows that no checkpoint holds."""
        found = self._resume()
        steps = self._run.how.steps
        with progress.task("reconstructing blocks", len(self._windows) * steps) as advance:
            advance(len(found) * steps)
            for window in self._windows[len(found) :]:
                with progress.task(self._progress_line(found), steps) as advance_window:

                    def both(amount: float, window_too: Advance = advance_window) -> None:
                        advance(amount)
                        window_too(amount)

                    found.append(self._reconstruct(window, both))
                self._finish(window, found[-1])
        return [*found, *(_left_alone(record) for record in found if not record.kept)]

    def skips(self) -> Iterator[Skip]:
        """Yield why weights are not learned."""
        for weight, reason in self._places.reasons.items():
            for site in weight.sites:
                yield Skip(RULE, site.label, reason)

    def _progress_line(self, found: Sequence[WindowRewrite]) -> str:
        text = f"window {len(found) + 1} of {len(self._windows)}"
        if not found:
            return text
        return f"{text}, loss of the last {found[-1].loss_before:.3g} -> {found[-1].loss_after:.3g}"

    def _resume(self) -> list[WindowRewrite]:
        """Put what a checkpoint holds into the graph, and return its records."""
        if self._checkpoint is None:
            return []
        found = self._checkpoint.finished()[: len(self._windows)]
        for window in self._windows[: len(found)]:
            arrays = self._checkpoint.written(window.index)
            for weight in self._places.weights(window.left):
                key = self._start.weights.index(weight)
                parts = {part: arrays[f"{key}.{part}"] for part in ("codes", "scale")}
                put_contents(weight, parts, self._store)
                note_quality(weight)
            for step in self._places.step_sizes(window.left):
                put_array(step.scale, arrays[f"step {step.name}"], self._store)
        if found:
            self._take_up(self._windows[len(found) - 1], self._checkpoint.carried(len(found) - 1))
        return found

    def _take_up(self, last: Window, carried: Arrays) -> None:
        """Go on from what was learned of blocks that a later window holds too."""
        for trained, key in self._held(last):
            count = len(trained.parameters())
            trained.restore([torch.from_numpy(carried[f"{key}.{at}"]) for at in range(count)])

    def _held(self, window: Window) -> Iterator[tuple[Trained, str]]:
        """Yield what is learned of the blocks that do not leave with a window, and its key."""
        for weight in self._places.weights(window.staying):
            yield self._weight(weight), f"{self._start.weights.index(weight)}"
        for step in self._places.step_sizes(window.staying):
            yield self._step(step), f"step {step.name}"

    def _reconstruct(self, window: Window, advance: Advance) -> WindowRewrite:
        begin = time.perf_counter()
        forget_peak(self._device)
        while self._student.block.index < window.start:
            self._student.advance()
        while self._teacher.block.index < min(window.stop, len(self._blocks) - 1):
            self._teacher.advance()
        trainer = self._trainer(window)
        trainee = trainer.trainee
        learned, held_out = self._split()
        state = trainee.state()
        before = trainer.loss(held_out)
        trainer.train(learned, self._run.how.seed + window.index, advance)
        after = trainer.loss(held_out)
        kept = improves(after, before)
        if not kept:
            trainee.restore(state)
        codes = sum(each.size for each in trainee.weights)
        flipped = sum(each.harden().flipped for each in trainee.weights)
        detail = f"loss {before:.4g} -> {after:.4g}"
        detail += (
            f", {flipped / max(1, codes):.2%} of codes are others" if kept else ", left as it was"
        )
        return WindowRewrite(
            RULE,
            self._label(window),
            detail,
            window.index,
            before,
            after,
            kept,
            codes,
            flipped,
            time.perf_counter() - begin,
            peak_of(self._device),
        )

    def _finish(self, window: Window, record: WindowRewrite) -> None:
        """Write what no later window will change, and forget it."""
        written: Arrays = {}
        for weight in self._places.weights(window.left):
            hardened = self._weights.pop(weight).harden()
            parts = {"codes": hardened.codes, "scale": hardened.scale}
            put_contents(weight, parts, self._store)
            note_quality(weight)
            key = self._start.weights.index(weight)
            written |= {f"{key}.{part}": array for part, array in parts.items()}
        for step in self._places.step_sizes(window.left):
            array = self._steps.pop(step.name).value().detach().cpu().numpy()
            put_array(step.scale, array, self._store)
            written[f"step {step.name}"] = array
        if self._checkpoint is not None:
            carried = {
                f"{key}.{at}": each.numpy()
                for trained, key in self._held(window)
                for at, each in enumerate(trained.state())
            }
            self._checkpoint.put(record, written, carried)

    def _label(self, window: Window) -> str:
        blocks = self._blocks[window.start : window.stop]
        names = [block.label or f"block {block.index}" for block in blocks]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    def _trainee(self, window: Window) -> Trainee:
        """Return the quantized window; what an earlier one learned of it goes on from there."""
        inside = range(window.start, window.stop)
        weights = [self._weight(weight) for weight in self._places.weights(inside)]
        steps = [self._step(step) for step in self._places.step_sizes(inside)]
        names = self._outputs(window)
        # Codes of activations need more bits than the half types have.
        compute = torch.float32 if steps else _TYPES[self._run.how.compute]
        program = self._program(self._start.model, window, compute)
        return Trainee(program, names, weights, steps, compute)

    def _trainer(self, window: Window) -> WindowTrainer:
        how = self._run.how
        trainee = self._trainee(window)
        terms = LossTerms(1.0, how.kl)
        if how.logits and window.stop == len(self._blocks):
            terms = LossTerms(0.0, 1.0)
        data = self._data(window, trainee)
        return WindowTrainer(trainee, data, how, terms)

    def _program(self, model: ir.Model, window: Window, dtype: torch.dtype) -> Program:
        cut = self._blocks[window.start].input
        return program_from(model, cut, self._outputs(window), device=self._device, dtype=dtype)

    def _outputs(self, window: Window) -> tuple[str, ...]:
        """Return the names of what a window is judged by."""
        output = self._blocks[window.stop - 1].output
        if output is not None:
            return (output,)
        outputs = self._start.original.graph.outputs
        return tuple(v.name or "" for v in outputs if v.dtype in _FLOATS)

    def _split(self) -> tuple[list[int], list[int]]:
        """Return the calls to learn from and those that judge; a single call is both."""
        calls = list(range(self._student.calls))
        cut = len(calls) - max(1, len(calls) // _HELD_OUT)
        return (calls[:cut], calls[cut:]) if cut else (calls, calls)

    def _data(self, window: Window, trainee: Trainee) -> WindowData:
        names = trainee.program.input_names
        targets = self._targets(window)

        cut = self._blocks[window.start].input

        def feeds(call: int) -> Fed:
            kept = self._student.kept(call, names)
            found = {name: _on(self._device, value) for name, value in kept.items()}
            if cut in found:
                # A program converts what has a type in the graph; a cut value may have none.
                found[cut] = _tensor(found[cut]).to(trainee.compute)
            return found

        def run(given: Fed) -> list[Tensor]:
            return trainee.run(given, *trainee.hard())

        some = [feeds(call) for call in range(min(2, self._student.calls))]
        joins = self._run.how.batch > 1 and len(some) > 1 and can_join(run, some)
        return WindowData(feeds, targets, self._tokens, joins=joins)

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
        if self._blocks[window.stop - 1].output is not None:

            def kept(call: int) -> tuple[Tensor, ...]:
                found = self._teacher.kept(call, names)
                return tuple(_tensor(_on(self._device, found[name])) for name in names)

            return kept
        cut = self._blocks[-1].input
        program = program_from(self._start.original, cut, names, device=self._device)

        def computed(call: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                found = program(self._teacher.kept(call, program.input_names))
            return tuple(found[name] for name in names)

        return computed

    def _tokens(self, call: int) -> Tensor | None:
        """Return which tokens of a call count, None where all do."""
        name = self._run.padding_mask
        mask = None if name is None else self._student.input(call, name)
        return None if mask is None or mask.dim() != 2 else mask != 0

    def _weight(self, weight: CodedWeight) -> TrainedWeight:
        """Return what is learned of a weight, from an earlier window if it was in one."""
        if weight not in self._weights:
            how = self._run.how
            seed = how.seed + self._start.weights.index(weight)
            self._weights[weight] = TrainedWeight(weight, how, self._device, seed)
        return self._weights[weight]

    def _step(self, step: StepSize) -> TrainedStep:
        if step.name not in self._steps:
            self._steps[step.name] = TrainedStep(step, self._device)
        return self._steps[step.name]


def _left_alone(record: WindowRewrite) -> Skip:
    reason = (
        f"on held-out calls its loss would have gone from {record.loss_before:.4g} to "
        f"{record.loss_after:.4g}"
    )
    return Skip(RULE, record.node, reason)


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


def _on(device: torch.device, value: Tensor | Array) -> Tensor | Array:
    return value.to(device) if isinstance(value, Tensor) else value


def _tensor(value: Tensor | Array) -> Tensor:
    assert isinstance(value, Tensor)
    return value
