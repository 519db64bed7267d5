"""Learning the codes and step sizes of one window."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qcompiler.errors import ModelError, UsageError
from qcompiler.execution.torch import Program
from qcompiler.progress import Advance
from qcompiler.quant.reconstruction import BlockReconstruction, Rounding
from qcompiler.reconstruction.joined_calls import Fed, as_tensor, is_out_of_memory
from qcompiler.reconstruction.losses import LossTerms, total_loss
from qcompiler.reconstruction.trained import Trained
from qcompiler.reconstruction.trained_steps import TrainedStep
from qcompiler.reconstruction.trained_weights import TrainedWeight
from qcompiler.reconstruction.window_data import Batch, WindowData
from qcompiler.team import Alone, Team, owns

_HALF_SCALE: Final = 1024.0
"""What losses are multiplied by where float16 would lose small gradients."""
_SETTLING: Final = 0.2
"""Part of the steps before the regularizer begins (Li et al. 2021, BRECQ, arXiv 2102.05426)."""
_EXPONENTS: Final = (20.0, 2.0)
"""Of the regularizer, first and last."""


@dataclass(frozen=True, slots=True, eq=False)
class Trainee:
    """A window with what is learned in it.

    Attributes:
        program: The quantized window.
        outputs: Names of what it gives and is judged by.
        weights: Its weights.
        steps: Step sizes of its activations.
        compute: The type that it runs in.
        parts: Makes the same window block by block, each from what the one before gives.
    """

    program: Program
    outputs: tuple[str, ...]
    weights: Sequence[TrainedWeight]
    steps: Sequence[TrainedStep]
    compute: torch.dtype
    parts: Callable[[], Sequence[Program]]

    def run(
        self,
        feeds: Fed,
        values: Sequence[Tensor],
        steps: Sequence[Tensor],
        parts: Sequence[Program] | None = None,
    ) -> list[Tensor]:
        """Return the outputs with some values of weights and step sizes.

        With `parts` only what lies between blocks is kept for the gradient, and each block runs
        again on the way back (Chen et al. 2016, arXiv 1604.06174).
        """
        names = [each.weight.dequantized for each in self.weights]
        pairs = zip(names, values, strict=True)
        replace = {name: value for found, value in pairs for name in found}
        live = {each.step.name: s for each, s in zip(self.steps, steps, strict=True)}
        if parts is None:
            found = self.program(feeds, weights=live, replace=replace)
            return [found[name] for name in self.outputs]
        known: Fed = dict(feeds)
        for part in parts:
            given = (part, known, live, replace)
            # Nothing in a graph that learns is random.
            known |= checkpoint(_run_part, *given, use_reentrant=False, preserve_rng_state=False)
        return [as_tensor(known[name]) for name in self.outputs]

    def hard(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return weights and step sizes as they would be written now."""
        with torch.no_grad():
            values = [each.hard_values().to(self.compute) for each in self.weights]
            return values, [each.value() for each in self.steps]

    def learned(self) -> tuple[Trained, ...]:
        """Return all that is learned."""
        return (*self.weights, *self.steps)

    def state(self) -> list[list[Tensor]]:
        """Return copies of all that is learned."""
        return [each.state() for each in self.learned()]

    def restore(self, state: Sequence[Sequence[Tensor]]) -> None:
        """Take what `state` returned."""
        for each, saved in zip(self.learned(), state, strict=True):
            each.restore(saved)


def _run_part(
    part: Program, known: Fed, live: Mapping[str, Tensor], replace: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run one block of a window with what it takes of all that is given."""
    weights, values = set(part.weight_names), set(part.value_names)
    return part(
        {name: known[name] for name in part.input_names},
        weights={name: new for name, new in live.items() if name in weights},
        replace={name: new for name, new in replace.items() if name in values},
    )


class WindowTrainer:
    """Learns one window.

    Attributes:
        trainee: The window.
        batch_size: Calls that run at once; halved when memory runs out.
        parts: The window block by block, once memory does not suffice for one call; blocks then run
            again on the way back, one by one.
    """

    def __init__(
        self,
        trainee: Trainee,
        data: WindowData,
        settings: BlockReconstruction,
        terms: LossTerms,
        team: Team | None = None,
    ) -> None:
        """Prepare the optimizer.

        Args:
            trainee: The window.
            data: What it is taught.
            settings: How.
            terms: The loss.
            team: Who computes which calls; None is all of them here. What is learned is the same
                everywhere after each step.
        """
        self._team = team or Alone()
        self._terms = terms
        self.trainee = trainee
        self._data = data
        self._settings = settings
        self.batch_size = settings.batch
        self.parts: Sequence[Program] | None = None
        groups = _groups(trainee, settings)
        self._rates = list(groups)
        self._optimizer = torch.optim.Adam(
            [{"params": group, "lr": rate} for rate, group in groups.items()],
            betas=(0.9, 0.99),
            fused=True,
        )

    def loss(self, calls: Sequence[int]) -> float:
        """Return the mean loss over calls of what would be written now."""
        values, steps = self.trainee.hard()
        total = torch.zeros((), dtype=torch.float64)

        def add(batch: Batch) -> None:
            with torch.no_grad():
                loss = self._loss(batch, values, steps)
            total.add_(loss.cpu().double() * batch.calls)

        self._team.agree(lambda: self._each_batch(self._own(calls), add, lambda: total.zero_()))
        self._team.add_up([total])
        return float(total) / len(calls)

    def train(self, calls: Sequence[int], seed: int, advance: Advance) -> None:
        """Take all steps.

        Args:
            calls: What is learned from.
            seed: Of the order of calls.
            advance: Told of every step.
        """
        batch = min(self._settings.batch, len(calls))
        order = _order(calls, self._settings.steps, batch, seed)
        for step in range(self._settings.steps):
            share = 0.5 * (1 + cos(pi * step / self._settings.steps))
            if self._settings.rounding is Rounding.SOFT:
                share = 1.0  # the regularizer decides last, and needs rates to do so
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * share
            self._step(order[step], step)
            advance(1)
        # Sums are equal everywhere, and so should be all that is made of them; this makes sure.
        self._team.take_over([each.detach() for each in self._parameters()])

    def _parameters(self) -> list[Tensor]:
        return [each for group in self._optimizer.param_groups for each in group["params"]]

    def _own(self, calls: Sequence[int]) -> list[int]:
        return [call for call in calls if owns(self._team, call)]

    def _step(self, calls: Sequence[int], step: int) -> None:
        trainee = self.trainee
        made = [each.values() for each in trainee.weights] + [s.value() for s in trainee.steps]
        compute = trainee.compute
        count = len(trainee.weights)
        leaves = [
            value.detach().to(compute if index < count else value.dtype).requires_grad_()
            for index, value in enumerate(made)
        ]
        scale = _HALF_SCALE if compute is torch.float16 else 1.0

        def add(batch: Batch) -> None:
            loss = self._loss(batch, leaves[:count], leaves[count:])
            if not loss.requires_grad:
                message = "no gradient passes through this window"
                outside = ", ".join(trainee.program.outside_torch)
                hint = f"PyTorch does not run {outside}" if outside else "leave it out"
                raise ModelError(message, hint=hint)
            (loss * (scale * batch.calls / len(calls))).backward()  # type: ignore[no-untyped-call]

        def forget() -> None:
            for leaf in leaves:
                leaf.grad = None

        self._team.agree(lambda: self._each_batch(self._own(calls), add, forget))
        self._optimizer.zero_grad()
        self._carry_back(made, leaves, scale, step)

    def _carry_back(
        self, made: Sequence[Tensor], leaves: Sequence[Tensor], scale: float, step: int
    ) -> None:
        """Take gradients from weights to what they are made of, and make a step."""
        pairs = zip(made, leaves, strict=True)
        found = [None if leaf.grad is None else leaf.grad.to(m.dtype) / scale for m, leaf in pairs]
        overflow = scale != 1 and not all(bool(g.isfinite().all()) for g in found if g is not None)
        flags = torch.tensor([*(g is not None for g in found), overflow], dtype=torch.int32)
        self._team.add_up([flags])
        *anywhere, overflows = flags.tolist()
        # Half floats overflow now and then; that step is left out.
        if overflows:
            return
        reached = [m for m, somewhere in zip(made, anywhere, strict=True) if somewhere]
        kept = [g for g, somewhere in zip(found, anywhere, strict=True) if somewhere]
        gradients = [
            torch.zeros_like(m) if g is None else g for m, g in zip(reached, kept, strict=True)
        ]
        penalty = self._penalty(step)
        if penalty is not None:
            reached.append(penalty)
            gradients.append(torch.full_like(penalty, 1 / self._team.size))
        torch.autograd.backward(reached, gradients)
        self._team.add_up([p.grad for p in self._parameters() if p.grad is not None])
        self._optimizer.step()
        for each in self.trainee.learned():
            each.confine()

    def _penalty(self, step: int) -> Tensor | None:
        start = _SETTLING * self._settings.steps
        if step < start:
            return None
        share = (step - start) / (self._settings.steps - start)
        first, last = _EXPONENTS
        exponent = last + (first - last) * max(0.0, 1 - share)
        found = [each.regularizer(exponent) for each in self.trainee.weights]
        undecided = [each for each in found if each is not None]
        if not undecided:
            return None
        size = sum(each.size for each in self.trainee.weights)
        return self._settings.regularizer * torch.stack(undecided).sum() / size

    def _loss(self, batch: Batch, values: Sequence[Tensor], steps: Sequence[Tensor]) -> Tensor:
        found = self.trainee.run(batch.feeds, values, steps, self.parts)
        return total_loss(found, batch.targets, self._terms, batch.keep, batch.calls)

    def _go_by_blocks(self) -> bool:
        """Begin to run blocks one by one; say whether that is something else than before."""
        parts = self.trainee.parts() if self.parts is None else ()
        if len(parts) > 1:
            self.parts = parts
        return len(parts) > 1

    def _each_batch(
        self, calls: Sequence[int], work: Callable[[Batch], None], forget: Callable[[], object]
    ) -> None:
        """Do work for all calls, from the beginning with half the batch where memory runs out."""
        while True:
            try:
                for batch in self._data.batches(calls, self.batch_size):
                    work(batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1 and not self._go_by_blocks():
                    message = "one call alone takes more memory than there is"
                    hint = "use smaller windows or calls, or another device"
                    raise UsageError(message, hint=hint) from error
            else:
                return
            self.batch_size = max(1, self.batch_size // 2)
            forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _groups(trainee: Trainee, settings: BlockReconstruction) -> dict[float, list[Tensor]]:
    """Return all that is learned by its rate.

    A change of a scale moves the value of the largest code by twice the steps for each bit more.
    """
    found: dict[float, list[Tensor]] = {}
    for weight in trainee.weights:
        rate = settings.scale_rate * 2.0 ** (2 - weight.weight.spec.qtype.bits)
        found.setdefault(rate, []).append(weight.factors)
        if weight.matrices:
            found.setdefault(settings.code_rate, []).extend(weight.matrices)
    for step in trainee.steps:
        rate = settings.activation_rate * 2.0 ** (2 - step.step.bits)
        found.setdefault(rate, []).append(step.factor)
    return found


def _order(calls: Sequence[int], steps: int, batch: int, seed: int) -> list[list[int]]:
    """Return the calls of each step, in random order.

    The first call of a step is one of `calls[0::batch]`, the second one of `calls[1::batch]`, and
    so on, and all of these come before one comes again: processes that take turns with the calls
    have equally much to do in every step.
    """
    random = torch.Generator().manual_seed(seed)
    columns: list[list[int]] = []
    for first in range(batch):
        some, column = calls[first::batch], list[int]()
        while len(column) < steps:
            order = torch.randperm(len(some), generator=random).tolist()
            column += [some[index] for index in order]
        columns.append(column[:steps])
    return [list(each) for each in zip(*columns, strict=True)]


def improves(after: float, before: float) -> bool:
    """Whether a loss is a number and below another."""
    return isfinite(after) and after < before
