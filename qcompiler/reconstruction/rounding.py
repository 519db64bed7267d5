"""Rounding the weights of a Q/DQ graph again, block by block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from qcompiler.calibration.calls import Samples
from qcompiler.errors import ModelError, UsageError
from qcompiler.ir.channels.weights import data_input
from qcompiler.ir.dataflow import int_attribute, node_label
from qcompiler.ir.provenance import annotate
from qcompiler.ir.quantizable import Site
from qcompiler.ir.weights import WeightStore, read_all
from qcompiler.progress import Progress
from qcompiler.quant.ranges import sqnr_db
from qcompiler.reconstruction.block_stream import BlockStream, open_device
from qcompiler.reconstruction.data_rows import data_rows, same_rows, why_no_rows
from qcompiler.reconstruction.hessians import HessianSum
from qcompiler.reconstruction.starting_point import CodedWeight, StartingPoint
from qcompiler.reconstruction.value_cache import ValueCache
from qcompiler.reconstruction.weight_rounding import (
    Array,
    Mask,
    Rounded,
    RoundingSettings,
    SharedHessian,
    round_weight,
)

_Key = tuple[object, ...]
Keeper = Callable[[Array], None]
"""Puts what is left of masked elements where the graph adds it."""


@dataclass(frozen=True, slots=True)
class RoundingRun:
    """How a model is gone through.

    Attributes:
        settings: How each weight is rounded.
        device: Where blocks run and weights are rounded.
        memory: Bytes of values between blocks that may stay in memory; the others go to disk.
        true_sequential: Whether a weight sees data of the rounded weights of its own block too.
        padding_mask: Name of an input `[batch, tokens]` that is 0 where a token does not count.
    """

    settings: RoundingSettings = field(default_factory=RoundingSettings)
    device: str = "cpu"
    memory: int = 512 << 20
    true_sequential: bool = True
    padding_mask: str | None = "attention_mask"


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of one weight.

    Attributes:
        weight: The weight.
        reason: Why it has the codes it had, as a sentence; "" where it has new ones.
        sqnr_before: Output over output error on all samples with the start codes, in dB.
        sqnr_after: The same now.
        changed: Rows (output channels) with new codes.
        damping: What the Hessian was damped with.
        kept: float32, what is left at the elements of the weight's mask, in order; None without
            one, and where the weight was refused.
        importance: float32 `[groups, K]`, what the squared rounding error of an input channel
            costs once it was made up for (`compensation.importance`); None where it was refused.
    """

    weight: CodedWeight
    reason: str = ""
    sqnr_before: float = 0.0
    sqnr_after: float = 0.0
    changed: int = 0
    damping: float = 0.0
    kept: Array | None = None
    importance: Array | None = None


def round_model(
    start: StartingPoint,
    samples: Samples,
    run: RoundingRun,
    store: WeightStore,
    progress: Progress,
    masks: Mapping[str, Mask] | None = None,
    keepers: Mapping[str, Keeper] | None = None,
) -> list[Outcome]:
    """Give the weights of a Q/DQ graph codes that make up for each other's errors.

    The contents of initializers change, and what nodes say of their quality; no node does.

    Args:
        start: The graph, from `quantize_to_start`.
        samples: The calls.
        run: How.
        store: Where new codes go.
        progress: Where it is shown.
        masks: By name of the float weight, elements that stay in float: bool, of its shape. The
            graph then holds codes of 0 there, and the caller has to add what is left
            (`Outcome.kept`); following blocks are computed with it.
        keepers: By name of a weight with a mask whose graph adds these elements itself: gets what
            is left of them as soon as that is known.

    Returns:
        One outcome for each weight of `start`, in the same order.

    Raises:
        ModelError: What an op multiplies holds NaN or infinity on a sample.
        UsageError: The device cannot be used, a mask is of no weight, or the disk is full.
    """
    shapes = {weight.name: weight.rows.shape for weight in start.weights}
    for name, mask in (masks or {}).items():
        if shapes.get(name) != mask.shape:
            message = f"a mask of shape {list(mask.shape)} fits no weight of this name"
            raise UsageError(message, where=name)
    with ValueCache(store.directory, run.memory) as cache:
        rounder = _ModelRounder(start, samples, run, store, cache, masks or {}, keepers or {})
        return rounder.run(progress)


class _ModelRounder:
    """One run over a model."""

    def __init__(
        self,
        start: StartingPoint,
        samples: Samples,
        run: RoundingRun,
        store: WeightStore,
        cache: ValueCache,
        masks: Mapping[str, Mask],
        keepers: Mapping[str, Keeper],
    ) -> None:
        self._start = start
        self._run = run
        self._store = store
        self._masks = masks
        self._keepers = keepers
        self._device = open_device(run.device)
        self._home = {node: block.index for block in start.blocks for node in block.nodes}
        self._outcomes: dict[CodedWeight, Outcome] = {}
        for weight in start.weights:
            if reason := _why_not(weight, self._home):
                self._outcomes[weight] = Outcome(weight, reason)
        self._work = self._scheduled()
        self._stream = BlockStream(start.model, start.blocks, cache, self._device)
        if self._work:
            self._stream.read(samples)

    def run(self, progress: Progress) -> list[Outcome]:
        """Go through the blocks up to the last one with work."""
        total = sum(w.tensor.nbytes for w in self._start.weights if w not in self._outcomes)
        last = max(self._work, default=-1)
        with progress.task("rounding weights", total) as advance:
            for index in range(last + 1):
                for weights in self._levels(index):
                    hessians = self._hessians(weights)
                    for weight, hessian in zip(weights, hessians, strict=True):
                        self._outcomes[weight] = self._round(weight, hessian)
                        advance(weight.tensor.nbytes)
                    del hessians
                if index < last:
                    self._stream.advance()
                    self._forget_stand_ins(index)
        return [self._outcomes[weight] for weight in self._start.weights]

    def _scheduled(self) -> dict[int, dict[int, list[CodedWeight]]]:
        """Return weights by the block and the level of their first reader."""
        found: dict[int, dict[int, list[CodedWeight]]] = {}
        for weight in self._start.weights:
            if weight in self._outcomes:
                continue
            places = ((self._home[s.node], self._start.levels[s.node]) for s in weight.sites)
            block, level = min(places)
            found.setdefault(block, {}).setdefault(level, []).append(weight)
        return found

    def _levels(self, index: int) -> Iterator[list[CodedWeight]]:
        """Yield the weights of a block that are rounded on the same data, in order."""
        levels = self._work.get(index, {})
        if self._run.true_sequential:
            for level in sorted(levels):
                yield levels[level]
            return
        weights = [weight for level in sorted(levels) for weight in levels[level]]
        for weight in weights:
            self._stand_in(weight, read_all(weight.tensor).astype(np.float32))
        if weights:
            yield weights

    def _hessians(self, weights: Sequence[CodedWeight]) -> list[SharedHessian | None]:
        """Return the Hessian of each weight, None where no sample reaches it."""
        sums = self._collect(weights)
        shared: dict[tuple[_Key, ...], SharedHessian | None] = {}
        keys = [tuple(_key(site) for site in _products(weight)) for weight in weights]
        for each in keys:
            if each not in shared:
                shared[each] = _total([sums[key] for key in each])
        return [shared[each] for each in keys]

    def _collect(self, weights: Sequence[CodedWeight]) -> dict[_Key, HessianSum]:
        """Run the samples and add up what the sites of some weights multiply."""
        sites = {_key(site): site for weight in weights for site in _products(weight)}
        sums = {key: HessianSum() for key in sites}
        names = list(dict.fromkeys(_data(site) for site in sites.values()))
        for call, values in enumerate(self._stream.values(names)):
            keep = self._stream.tokens(call, self._run.padding_mask)
            for key, site in sites.items():
                for rows in data_rows(site, values[_data(site)], keep):
                    sums[key].add(rows)
        return sums

    def _round(self, weight: CodedWeight, hessian: SharedHessian | None) -> Outcome:
        if hessian is None:
            return Outcome(weight, "no sample reaches it")
        mask = self._masks.get(weight.name)
        try:
            rounded = round_weight(weight, hessian, self._run.settings, mask)
        except ModelError as error:
            message = f"{error.message}, so that its weight cannot be rounded"
            where = node_label(weight.sites[0].node)
            raise ModelError(
                message, where=where, hint="look at the samples", reason=error.reason
            ) from error
        kept = None if mask is None else rounded.values[mask]
        keeper = self._keepers.get(weight.name)
        if keeper is not None and kept is not None:
            keeper(kept)
        self._stand_in(weight, rounded.values)
        if rounded.changed or mask is not None:
            _write(weight, rounded, self._store)
        before = sqnr_db(rounded.signal, rounded.error_before)
        after = sqnr_db(rounded.signal, rounded.error_after)
        reason = "" if rounded.changed else f"no other codes leave more than {before:.1f} dB"
        return Outcome(
            weight,
            reason,
            before,
            after,
            rounded.changed,
            rounded.damping,
            kept,
            rounded.importance,
        )

    def _stand_in(self, weight: CodedWeight, values: Array) -> None:
        mask = self._masks.get(weight.name)
        if mask is not None and weight.name in self._keepers:
            values = np.where(mask, np.float32(0), values)  # the graph adds them
        tensor = torch.from_numpy(values).to(self._device)
        self._stream.stand_ins.update(dict.fromkeys(weight.dequantized, tensor))

    def _forget_stand_ins(self, index: int) -> None:
        """Drop all weights but those that a block behind this one reads, and no graph can hold."""
        needed = {
            name
            for weight in self._start.weights
            if weight.name in self._masks
            and any(self._home.get(site.node, -1) > index for site in weight.sites)
            for name in weight.dequantized
        }
        for name in [name for name in self._stream.stand_ins if name not in needed]:
            del self._stream.stand_ins[name]


def _why_not(weight: CodedWeight, home: Mapping[ir.Node, int]) -> str:
    """Return why a weight keeps its codes, as a sentence; "" if it need not."""
    first = weight.sites[0]
    for site in weight.sites:
        if site.node not in home:
            return "it lies in the body of another node, where its data cannot be seen"
        if site.axes != first.axes or _groups(site) != _groups(first):
            return f"its weight is read along other axes by {node_label(first.node)}"
    reasons = [why_no_rows(site) for site in _products(weight) or weight.sites]
    return next((reason for reason in reasons if reason), "")


def _products(weight: CodedWeight) -> list[Site]:
    """Return the sites that multiply by a weight; one that looks rows up says nothing of them."""
    return [site for site in weight.sites if site.row.data is not None]


def _groups(site: Site) -> int:
    return int_attribute(site.node, "group", 1)


def _data(site: Site) -> str:
    """Return the name of what a site multiplies."""
    position = data_input(site)
    value = None if position is None else site.node.inputs[position]
    assert value is not None
    return value.name or ""


def _key(site: Site) -> _Key:
    """Return what sites with the same Hessian have in common."""
    return (_data(site), site.row.op_type == "Conv", *same_rows(site))


def _total(sums: Sequence[HessianSum]) -> SharedHessian | None:
    """Return the sum of Hessians: that of a weight which several sites read."""
    found = [hessian for hessian in (each.hessian() for each in sums) if hessian is not None]
    if not found:
        return None
    total = found[0]
    for other in found[1:]:
        total = total + other
    return SharedHessian(total)


def _write(weight: CodedWeight, rounded: Rounded, store: WeightStore) -> None:
    """Put new contents into the initializers of a weight, and its new quality on its nodes."""
    pairs: list[tuple[ir.Value, npt.NDArray[np.generic] | None]] = [
        (weight.codes, rounded.codes),
        (weight.scale, rounded.scale),
    ]
    if weight.zero_point is not None:
        pairs.append((weight.zero_point, rounded.zero_point))
    for value, array in pairs:
        old = value.const_value
        assert old is not None
        assert array is not None
        value.const_value = store.put(value.name or "", array, old.dtype)
    quality = sqnr_db(rounded.squared_signal, rounded.squared_error)
    product = sqnr_db(rounded.signal, rounded.error_after)
    for site in weight.sites:
        annotate(site.node, weight_sqnr_db=quality, product_sqnr_db=product)
