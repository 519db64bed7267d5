"""Gradients of a loss by weights, block by block, absolute values summed over samples.

Signs must not cancel between samples: `G = sum_s |dL_s / dW|`, one sample at a time (TaCQ, section
3.1). Of a group of samples the values between blocks are kept on the way forward; on the way back
each block runs again, with gradient, on every sample. So the weights and gradients of one block
are in memory at once, and no more activations than one sample has in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import Final

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.task_calls import Task, TaskCall, TaskKind
from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from qcompiler.execution.torch.element_types import Array, to_torch
from qcompiler.ir.blocks import Block
from qcompiler.progress import Progress
from qcompiler.reconstruction.block_stream import BlockStream, open_device
from qcompiler.reconstruction.task_loss import Outputs, TaskLoss, loss_of
from qcompiler.reconstruction.tensor_files import TensorFiles
from qcompiler.reconstruction.value_cache import ValueCache

_GRADIENT: Final = "/gradient"
"""What the gradient by a block's result is called; no value of a graph has such a name."""


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A weight to differentiate by.

    Attributes:
        name: What its gradient is called.
        value: The value of the main graph that holds it: an initializer, or what a
            DequantizeLinear returns.
        read: Returns it, of any float type.
    """

    name: str
    value: str
    read: Callable[[], Array]


@dataclass(frozen=True, slots=True)
class GradientRun:
    """How gradients are computed.

    Attributes:
        device: Where blocks run.
        memory: Bytes that values between blocks may take; as many samples go through the model
            together as fit.
        signed: Whether signs may cancel: only to show that they must not.
    """

    device: str = "cpu"
    memory: int = 512 << 20
    signed: bool = False


def sum_gradients(
    model: ir.Model,
    blocks: Sequence[Block],
    leaves: Mapping[int, Sequence[Leaf]],
    task: Task,
    teacher: ir.Model,
    run: GradientRun,
    files: TensorFiles,
    progress: Progress,
) -> float:
    """Add up gradients of a task's loss.

    Args:
        model: The model to differentiate.
        blocks: Its blocks, cut values by name.
        leaves: By index of the block that alone reads them, the weights.
        task: Samples and loss.
        teacher: The float model, whose outputs a task of `OUTPUTS` is compared with; its cut
            values have the same names.
        run: How.
        files: Gets the sums, by names of leaves, of the shapes of the weights.
        progress: Where it is shown.

    Returns:
        The mean loss.

    Raises:
        ModelError: A node in the way has no gradient, or the loss is not finite.
        UsageError: The device cannot be used, the disk is full, or the loss does not fit.
    """
    chain = _Chain(model, blocks, leaves, loss_of(task, model), run)
    total, group = 0.0, 0
    calls = task.read()
    with progress.task("finding gradients", max(1, task.count * len(blocks))) as advance:
        while batch := list(islice(calls, max(1, group))):
            with ValueCache(files.home, run.memory) as cache:
                chain.forward(batch, cache)
                if not group:
                    # On the way back every value has a gradient beside it for a while.
                    room = run.memory // (2 * max(1, cache.held_bytes))
                    group = max(1, min(room, task.count))
                    others = list(islice(calls, group - 1))
                    chain.forward(others, cache, first=1)
                    batch += others
                truths = _truths(task, teacher, blocks, batch, run, files)
                total += chain.backward(batch, cache, truths, files, advance)
    return total / max(1, task.count)


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What one block needs.

    Attributes:
        block: The block.
        program: Computes its result from its start.
        tensors: The weights to differentiate by, by value; on the way forward those of them that
            are computed from codes.
        sums: Of their gradients, on the way back.
    """

    block: Block
    program: Program
    tensors: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]


class _Chain:
    """The blocks of a model, forwards and backwards."""

    def __init__(
        self,
        model: ir.Model,
        blocks: Sequence[Block],
        leaves: Mapping[int, Sequence[Leaf]],
        loss: TaskLoss,
        run: GradientRun,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._leaves = leaves
        self._loss = loss
        self._run = run
        self._device = open_device(run.device)
        self._outputs = [value.name or "" for value in model.graph.outputs]

    def forward(self, batch: Sequence[TaskCall], cache: ValueCache, first: int = 0) -> None:
        """Run all blocks but the last on some samples, and keep what lies between them.

        The first of the samples has number `first` in the cache.
        """
        numbers = range(first, first + len(batch))
        for at, call in zip(numbers, batch, strict=True):
            for name, array in call.feeds.items():
                is_text = array.dtype.kind in "UO"
                cache.put(at, name, array if is_text else to_torch(array))
        for block in self._blocks[:-1] if batch else ():
            assert block.output is not None
            work = self._work(block, backward=False)
            for at in numbers:
                with torch.no_grad():
                    found = self._compute(work, at, cache, None)
                cache.put(at, block.output, found[block.output])

    def backward(
        self,
        batch: Sequence[TaskCall],
        cache: ValueCache,
        truths: Iterator[Outputs],
        files: TensorFiles,
        advance: Callable[[float], None],
    ) -> float:
        """Go back through the blocks; return the sum of the losses."""
        total = 0.0
        first = min(self._leaves, default=len(self._blocks))
        for block in reversed(self._blocks[first:]):
            work = self._work(block, backward=True)
            for at, call in enumerate(batch):
                total += self._differentiate(work, call, at, cache, truths)
                advance(1)
            for leaf in self._leaves.get(block.index, ()):
                files.add(leaf.name, work.sums[leaf.value].cpu().numpy())
        return total

    def _differentiate(
        self, work: _Work, call: TaskCall, at: int, cache: ValueCache, truths: Iterator[Outputs]
    ) -> float:
        """Add the gradients of one block and sample; return the loss if it is the last block."""
        block = work.block
        start = None if block.input is None else cache.get(at, block.input)
        inside = isinstance(start, Tensor) and block.index > min(self._leaves)
        if inside:
            assert isinstance(start, Tensor)
            start = start.to(self._device).requires_grad_()
        found = self._compute(work, at, cache, start if isinstance(start, Tensor) else None)
        loss, seed = 0.0, None
        if block.output is None:
            end = self._loss({name: found[name] for name in self._outputs}, call, next(truths))
            loss = float(end.detach())
        else:
            end = found[block.output]
            kept = cache.get(at, _GRADIENT)
            assert isinstance(kept, Tensor)
            seed = kept.to(self._device)
        _check(end, loss, work.program)
        wanted = [*work.tensors.values()]
        if inside:
            assert isinstance(start, Tensor)
            wanted.append(start)
        gradients = torch.autograd.grad(end, wanted, seed, allow_unused=True)
        for name, gradient in zip(work.tensors, gradients, strict=False):
            if gradient is not None:
                work.sums[name].add_(gradient if self._run.signed else gradient.abs())
        if block.input is not None and inside:
            assert isinstance(start, Tensor)
            last = gradients[-1]
            cache.put(at, _GRADIENT, torch.zeros_like(start) if last is None else last)
            cache.drop(at, block.input)
        return loss

    def _compute(
        self, work: _Work, at: int, cache: ValueCache, start: Tensor | None
    ) -> dict[str, Tensor]:
        feeds = {
            name: start if start is not None and name == work.block.input else cache.get(at, name)
            for name in work.program.input_names
        }
        constants = set(work.program.weight_names)
        weights = {name: tensor for name, tensor in work.tensors.items() if name in constants}
        replace = {name: tensor for name, tensor in work.tensors.items() if name not in constants}
        return work.program(feeds, weights=weights, replace=replace)

    def _work(self, block: Block, *, backward: bool) -> _Work:
        """Load a block; on the way forward only what codes stand for, so that it is found once."""
        cuts = None if block.input is None else [block.input]
        ends = self._outputs if block.output is None else [block.output]
        program = Program.from_subgraph(
            self._model, cuts, ends, device=self._device, dtype=torch.float32
        )
        constants = set(program.weight_names)
        tensors = {
            leaf.value: to_torch(leaf.read()).to(self._device).to(torch.float32)
            for leaf in self._leaves.get(block.index, ())
            if backward or leaf.value not in constants
        }
        for each in tensors.values() if backward else ():
            each.requires_grad_()
        sums = {name: torch.zeros_like(each) for name, each in tensors.items() if backward}
        return _Work(block, program, tensors, sums)


def _truths(
    task: Task,
    teacher: ir.Model,
    blocks: Sequence[Block],
    batch: Sequence[TaskCall],
    run: GradientRun,
    files: TensorFiles,
) -> Iterator[Outputs]:
    """Yield what the float model returns for each sample; nothing of it where no loss asks."""
    if task.kind is not TaskKind.OUTPUTS:
        yield from ({} for _ in batch)
        return
    outputs = [value.name or "" for value in teacher.graph.outputs]
    with ValueCache(files.home, run.memory) as cache:
        stream = BlockStream(teacher, blocks, cache, open_device(run.device))
        stream.read(Samples("", False, len(batch), lambda: (call.feeds for call in batch)))
        for _ in blocks[:-1]:
            stream.advance()
        yield from stream.values(outputs)


def _check(end: Tensor, loss: float, program: Program) -> None:
    """Stop where no gradient can be had."""
    if not isfinite(loss):
        message = f"the loss is {loss} on a sample"
        raise ModelError(message, where="--task", hint="look at the samples")
    if not end.requires_grad:
        outside = ", ".join(program.outside_torch[:4])
        message = "no gradient passes through this part of the model"
        hint = f"it is lost at {outside}" if outside else "what it returns depends on no weight"
        raise ModelError(message, hint=hint)
