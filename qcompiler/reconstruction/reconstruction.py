"""Learning codes and step sizes of a Q/DQ graph, window by window (CBQ)."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import torch

from qcompiler.calibration.calls import Samples
from qcompiler.errors import UsageError
from qcompiler.ir.weights import WeightStore
from qcompiler.progress import Advance, Progress
from qcompiler.reconstruction.checkpoint import Arrays, Checkpoint
from qcompiler.reconstruction.peak import forget_peak, peak_of
from qcompiler.reconstruction.starting_point import StartingPoint
from qcompiler.reconstruction.trained import Trained
from qcompiler.reconstruction.value_cache import ValueCache
from qcompiler.reconstruction.window_making import ReconstructionRun, WindowMaker
from qcompiler.reconstruction.window_training import WindowTrainer, improves
from qcompiler.reconstruction.windows import Window, cut_windows
from qcompiler.reconstruction.writing import note_quality, put_contents, put_step
from qcompiler.rewriting.base import Rewrite, Skip
from qcompiler.rewriting.window_record import WindowRewrite

RULE: Final = "reconstruct-blocks"


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
        checkpoint: Where finished windows are kept, and those that are there taken from. A team
            has one, whose leading process writes.

    Returns:
        A `WindowRewrite` for each window, in order; a skip for each that was left as it was, and
        for each weight that is not learned.

    Raises:
        ModelError: No gradient passes through a window.
        UsageError: The device cannot be used, memory does not suffice for one call, there are fewer
            calls than processes, or the disk is full.
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
        self._team = run.team
        self._store = store
        self._maker = WindowMaker(start, run, caches)
        self._places = self._maker.places
        self._windows = self._cut()
        if self._windows:
            self._team.agree(lambda: self._read(samples))

    def _read(self, samples: Samples) -> None:
        self._maker.read(samples)
        calls = len(self._maker.split()[0])
        if calls < self._team.size:
            message = f"{self._team.size} processes cannot share {calls} calls to learn from"
            raise UsageError(message, hint="start fewer processes, or give more samples")

    def _cut(self) -> list[Window]:
        span = self._places.span()
        if span is None:
            return []
        first, last = span
        if self._run.how.logits:
            last = len(self._maker.blocks) - 1
        return cut_windows(first, last, self._run.how.window, self._run.how.overlap)

    def run(self, progress: Progress) -> list[Rewrite | Skip]:
        """Go through all windows that no checkpoint holds."""
        found = self._team.agree(self._resume)
        steps = self._run.how.steps
        with progress.task("reconstructing blocks", len(self._windows) * steps) as advance:
            advance(len(found) * steps)
            for window in self._windows[len(found) :]:
                with progress.task(self._progress_line(found), steps) as advance_window:

                    def both(amount: float, window_too: Advance = advance_window) -> None:
                        advance(amount)
                        window_too(amount)

                    found.append(self._reconstruct(window, both))
                self._team.agree(partial(self._finish, window, found[-1]))
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
        seconds = sum(record.seconds for record in found) / len(found)
        minutes = seconds * (len(self._windows) - len(found)) / 60
        last = f"loss of the last {found[-1].loss_before:.3g} -> {found[-1].loss_after:.3g}"
        return f"{text}, {minutes:.0f} min left for all, {last}"

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
                put_step(step.scale, arrays[f"step {step.name}"], self._store)
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
            yield self._maker.weight(weight), f"{self._start.weights.index(weight)}"
        for step in self._places.step_sizes(window.staying):
            yield self._maker.step(step), f"step {step.name}"

    def _reconstruct(self, window: Window, advance: Advance) -> WindowRewrite:
        begin = time.perf_counter()
        trainer = self._team.agree(lambda: self._trainer(window))
        trainee = trainer.trainee
        learned, held_out = self._maker.split()
        state = trainee.state()
        before = trainer.loss(held_out)
        trainer.train(learned, self._run.how.seed + window.index, advance)
        after = trainer.loss(held_out)
        kept = improves(after, before)
        if not kept:
            trainee.restore(state)
        codes = sum(each.size for each in trainee.weights)
        flipped = sum(each.flipped() for each in trainee.weights)
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
            peak_of(self._maker.device),
        )

    def _trainer(self, window: Window) -> WindowTrainer:
        forget_peak(self._maker.device)
        self._maker.stand_at(window)
        return self._maker.trainer(window)

    def _finish(self, window: Window, record: WindowRewrite) -> None:
        """Write what no later window will change, and forget it."""
        written: Arrays = {}
        for weight in self._places.weights(window.left):
            hardened = self._maker.forget(weight).harden()
            parts = {"codes": hardened.codes, "scale": hardened.scale}
            put_contents(weight, parts, self._store)
            note_quality(weight)
            key = self._start.weights.index(weight)
            written |= {f"{key}.{part}": array for part, array in parts.items()}
        for step in self._places.step_sizes(window.left):
            array = self._maker.forget_step(step).value().detach().cpu().numpy()
            put_step(step.scale, array, self._store)
            written[f"step {step.name}"] = array
        if self._checkpoint is not None and not self._team.rank:
            carried = {
                f"{key}.{at}": each.numpy()
                for trained, key in self._held(window)
                for at, each in enumerate(trained.state())
            }
            self._checkpoint.put(record, written, carried)

    def _label(self, window: Window) -> str:
        blocks = self._maker.blocks[window.start : window.stop]
        names = [block.label or f"block {block.index}" for block in blocks]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _left_alone(record: WindowRewrite) -> Skip:
    reason = (
        f"on held-out calls its loss would have gone from {record.loss_before:.4g} to "
        f"{record.loss_after:.4g}"
    )
    return Skip(RULE, record.node, reason)
