"""Learning codes and step sizes of a Q/DQ graph, window by window (CBQ)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.calibration.calls import Samples
from qcompiler.execution.torch import Program
from qcompiler.execution.torch.element_types import Array
from qcompiler.ir.provenance import PRODUCT_SQNR, annotate
from qcompiler.ir.weights import WeightStore, read_all
from qcompiler.progress import Advance, Progress
from qcompiler.quant.ranges import sqnr_db
from qcompiler.reconstruction.block_stream import BlockStream, open_device, program_from
from qcompiler.reconstruction.losses import LossTerms
from qcompiler.reconstruction.starting_point import CodedWeight, StartingPoint
from qcompiler.reconstruction.trained_steps import TrainedStep
from qcompiler.reconstruction.trained_weights import TrainedWeight
from qcompiler.reconstruction.value_cache import ValueCache
from qcompiler.reconstruction.window_data import Branches, Fed, WindowData, can_join
from qcompiler.reconstruction.window_training import (
    LearningSettings,
    Trainee,
    WindowTrainer,
    improves,
)
from qcompiler.reconstruction.windows import Places, Window, cut_windows
from qcompiler.rewriting.window_record import WindowRewrite

_HELD_OUT: Final = 8
"""One call of so many is not learned from, and judges what was learned."""


@dataclass(frozen=True, slots=True)
class ReconstructionRun:
    """How a model is gone through.

    Attributes:
        settings: How each window is learned.
        window: Blocks in a window.
        overlap: Blocks that a window shares with the one before.
        layers: Whether blocks are layers, which are joined of several where they repeat.
        logits: Whether a last window reaches the graph's outputs and is judged by the divergence
            of their softmax.
        device: Where windows run.
        memory: Bytes of values between blocks that may stay in memory; the others go to disk.
        padding_mask: Name of an input `[batch, tokens]` that is 0 where a token does not count.
        seed: Of the order of calls and the random half of `lora`.
    """

    settings: LearningSettings = field(default_factory=LearningSettings)
    window: int = 2
    overlap: int = 1
    layers: bool = True
    logits: bool = False
    device: str = "cpu"
    memory: int = 512 << 20
    padding_mask: str | None = "attention_mask"
    seed: int = 0


def reconstruct_model(
    start: StartingPoint,
    samples: Samples,
    run: ReconstructionRun,
    store: WeightStore,
    progress: Progress,
) -> list[WindowRewrite]:
    """Learn window by window, and write what was learned into the graph's initializers.

    Args:
        start: The graph, with the codes to begin with.
        samples: The calls.
        run: How.
        store: Where new codes go.
        progress: Where it is shown.
    """
    with (
        ValueCache(store.directory, run.memory // 2) as cache,
        ValueCache(store.directory, run.memory // 2) as float_cache,
    ):
        return _Reconstruction(start, samples, run, store, (cache, float_cache)).run(progress)


class _Reconstruction:
    """One run over a model."""

    def __init__(
        self,
        start: StartingPoint,
        samples: Samples,
        run: ReconstructionRun,
        store: WeightStore,
        caches: tuple[ValueCache, ValueCache],
    ) -> None:
        self._start = start
        self._run = run
        self._store = store
        self._device = open_device(run.device)
        self._blocks = start.layers if run.layers else start.blocks
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
        if self._run.logits:
            last = len(self._blocks) - 1
        return cut_windows(first, last, self._run.window, self._run.overlap)

    def run(self, progress: Progress) -> list[WindowRewrite]:
        """Go through all windows."""
        found: list[WindowRewrite] = []
        total = len(self._windows) * self._run.settings.steps
        with progress.task("reconstructing blocks", total) as advance:
            for window in self._windows:
                found.append(self._reconstruct(window, advance))
                self._leave(window)
        return found

    def _reconstruct(self, window: Window, advance: Advance) -> WindowRewrite:
        begin = time.perf_counter()
        while self._student.block.index < window.start:
            self._student.advance()
        while self._teacher.block.index < min(window.stop, len(self._blocks) - 1):
            self._teacher.advance()
        trainee = self._trainee(window)
        data = self._data(window, trainee)
        trainer = WindowTrainer(trainee, data, self._settings(window, trainee))
        learned, held_out = self._split()
        state = trainee.state()
        before = trainer.loss(held_out)
        trainer.train(learned, self._run.seed + window.index, advance)
        after = trainer.loss(held_out)
        kept = improves(after, before)
        if not kept:
            trainee.restore(state)
        flipped = sum(each.harden().flipped for each in trainee.weights)
        return WindowRewrite(
            "reconstruct-blocks",
            self._label(window),
            "",
            window.index,
            before,
            after,
            kept,
            sum(each.size for each in trainee.weights),
            flipped,
            time.perf_counter() - begin,
            0,
        )

    def _label(self, window: Window) -> str:
        blocks = self._blocks[window.start : window.stop]
        names = [block.label or f"block {block.index}" for block in blocks]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    def _trainee(self, window: Window) -> Trainee:
        """Return the quantized window; what an earlier one learned of it goes on from there."""
        inside = range(window.start, window.stop)
        for weight in self._places.weights(inside):
            if weight not in self._weights:
                seed = self._run.seed + len(self._weights)
                how = self._run.settings.how
                self._weights[weight] = TrainedWeight(weight, how, self._device, seed)
        for step in self._places.step_sizes(inside):
            if step.name not in self._steps:
                self._steps[step.name] = TrainedStep(step, self._device)
        weights = [self._weights[weight] for weight in self._places.weights(inside)]
        steps = [self._steps[step.name] for step in self._places.step_sizes(inside)]
        names = self._outputs(window)
        program = self._program(self._start.model, window, self._compute(bool(steps)))
        return Trainee(program, names, weights, steps)

    def _compute(self, has_steps: bool) -> torch.dtype:
        return torch.float32 if has_steps else self._run.settings.compute

    def _settings(self, window: Window, trainee: Trainee) -> LearningSettings:
        settings = replace(self._run.settings, compute=self._compute(bool(trainee.steps)))
        if self._run.logits and window.stop == len(self._blocks):
            settings = replace(settings, terms=LossTerms(squared=0.0, kl=1.0))
        return settings

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

        def feeds(call: int) -> Fed:
            return {name: _on(self._device, v) for name, v in self._student.kept(call, names).items()}

        def run(given: Fed) -> list[Tensor]:
            return trainee.run(given, *trainee.hard())

        some = [feeds(call) for call in range(min(2, self._student.calls))]
        joins = self._run.settings.batch > 1 and len(some) > 1 and can_join(run, some)
        return WindowData(feeds, targets, self._tokens, joins=joins)

    def _targets(self, window: Window) -> Callable[[int], Branches]:
        """Return what gives the outputs a window should have in a call, branch by branch."""
        branches = [self._float_outputs(window)]
        if self._run.settings.homologous:
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

    def _leave(self, window: Window) -> None:
        """Write what no later window will change, and forget it."""
        inside = range(window.start, window.leaving)
        for weight in self._places.weights(inside):
            _write(self._weights.pop(weight), self._store)
        for step in self._places.step_sizes(inside):
            trained = self._steps.pop(step.name)
            array = trained.value().detach().cpu().numpy()
            _put(step.scale, array, self._store)


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


def _write(trained: TrainedWeight, store: WeightStore) -> None:
    """Put a learned weight into its initializers, and its new quality on its nodes."""
    weight = trained.weight
    hardened = trained.harden()
    exact = read_all(weight.tensor).astype(np.float32)
    error = np.square(trained.hard_values().cpu().numpy() - exact, dtype=np.float64).sum()
    quality = sqnr_db(float(np.square(exact, dtype=np.float64).sum()), float(error))
    _put(weight.codes, hardened.codes, store)
    _put(weight.scale, hardened.scale, store)
    for site in weight.sites:
        annotate(site.node, weight_sqnr_db=quality)
        # That of the op alone says nothing any more: its inputs and its aim are others.
        site.node.metadata_props.pop(PRODUCT_SQNR, None)


def _put(value: ir.Value, array: Array, store: WeightStore) -> None:
    old = value.const_value
    assert old is not None
    if array.dtype == np.float32:
        array = array.astype(old.dtype.numpy())
    value.const_value = store.put(value.name or "", array.reshape(old.shape.numpy()), old.dtype)
