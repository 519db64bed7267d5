"""Running a model block by block on all samples, with what lies between blocks kept."""

from collections.abc import Iterator, Sequence
from typing import Final

import onnx_ir as ir
import torch

from qcompiler.calibration.calls import Samples
from qcompiler.errors import UsageError
from qcompiler.execution.torch import Program
from qcompiler.execution.torch.element_types import Array, to_torch
from qcompiler.ir.blocks import Block
from qcompiler.ir.subgraph import subgraph_between
from qcompiler.reconstruction.joined_calls import Fed, run_joined
from qcompiler.reconstruction.value_cache import ValueCache
from qcompiler.team import Alone, Team, owns

_MOST_JOINED: Final = 16
"""Calls that run at once where starting a kernel costs more than computing it."""
_MASK_RANK: Final = 2


def open_device(name: str) -> torch.device:
    """Return a device that can be computed on.

    Args:
        name: As PyTorch calls it: "cpu", "cuda", "cuda:1".

    Raises:
        UsageError: There is no such device, or this PyTorch cannot use it.
    """
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        message = f"PyTorch cannot use this device: {str(error).splitlines()[0]}"
        raise UsageError(message, where=name, hint="name another one, such as cpu") from error


class BlockStream:
    """Goes through the blocks of a model; at each, values of it can be asked for.

    A block starts from what the blocks before it gave when they were left, so that it sees their
    last codes. Weights are loaded for what is asked for, and forgotten afterwards. Programs are
    made when they are needed: codes may be exchanged at any time before.

    Attributes:
        stand_ins: Tensors to compute with in place of values of the graph, by name: a weight that
            was dequantized once, or one that the graph cannot hold. They are used where they are
            needed, until somebody removes them.
    """

    def __init__(
        self,
        model: ir.Model,
        blocks: Sequence[Block],
        cache: ValueCache,
        device: torch.device,
        team: Team | None = None,
        joined: int | None = None,
    ) -> None:
        """Stand at the first block, without any call.

        Args:
            model: The model.
            blocks: A chain of blocks, from the graph's start; cut values by their names.
            cache: Where values go.
            device: Where blocks run.
            team: Who computes which calls; None is all of them here.
            joined: Calls that run at once, at most; None is 1 on the CPU and 16 elsewhere.
        """
        self._team = team or Alone()
        self._model = model
        self._blocks = tuple(blocks)
        self._cache = cache
        self._device = device
        self._at = 0
        self._calls = 0
        self._own: list[int] = []
        self._joined = joined or (1 if device.type == "cpu" else _MOST_JOINED)
        self.stand_ins: dict[str, torch.Tensor] = {}

    def read(self, samples: Samples) -> None:
        """Take the calls from their source; inputs of the graph stay at hand for all blocks."""
        for call, feeds in enumerate(samples):
            self._calls += 1
            if not owns(self._team, call):
                continue
            self._own.append(call)
            for name, array in feeds.items():
                is_text = array.dtype.kind in "UO"
                self._cache.put(call, name, array if is_text else to_torch(array))

    @property
    def calls(self) -> int:
        """Number of calls, of the whole team."""
        return self._calls

    @property
    def own(self) -> tuple[int, ...]:
        """The calls that are computed here."""
        return tuple(self._own)

    @property
    def block(self) -> Block:
        """The block the stream stands at."""
        return self._blocks[self._at]

    def tokens(self, call: int, name: str | None) -> torch.Tensor | None:
        """Return which tokens of a call count, bool `[batch, tokens]`; None where all do.

        Args:
            call: The call.
            name: Of an input that is 0 where a token does not count, if the graph has one.
        """
        try:
            mask = None if name is None else self._cache.get(call, name)
        except KeyError:
            return None
        if not isinstance(mask, torch.Tensor) or mask.dim() != _MASK_RANK or bool(mask.all()):
            return None
        return (mask != 0).to(self._device)

    def kept(self, call: int, names: Sequence[str]) -> dict[str, torch.Tensor | Array]:
        """Return what is kept of a call: inputs of the graph, and where the block starts."""
        return {name: self._cache.get(call, name) for name in names}

    def values(self, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield some values of the block, or of a later one, for each own call in order.

        What lies beyond the block runs with the codes that are there now.
        """
        program = self._program(names)
        known = set(program.value_names)
        replace = {name: new for name, new in self.stand_ins.items() if name in known}

        def run(feeds: Fed) -> list[torch.Tensor]:
            with torch.no_grad():
                results = program(feeds, replace=replace)
            return [results[name] for name in names]

        fed = (self.kept(call, program.input_names) for call in self._own)
        for found in run_joined(run, fed, self._joined):
            yield dict(zip(names, found, strict=True))

    def advance(self) -> None:
        """Run the block to its end on every call, and stand at the next one.

        Does nothing but that where the block is the last.
        """
        block = self.block
        if block.output is not None:
            found = self.values([block.output])
            for call, values in zip(self._own, found, strict=True):
                self._cache.put(call, block.output, values[block.output])
                if block.input is not None:
                    self._cache.drop(call, block.input)
        self._at += 1

    def _program(self, names: Sequence[str]) -> Program:
        # Names of later blocks bring the weights of all blocks in between: too many to keep.
        later = {node for block in self._blocks[self._at + 1 :] for node in block.nodes}
        whole = subgraph_between(self._model, None, names)
        keep = later.isdisjoint(whole.nodes)
        return program_from(
            self._model, self.block.input, names, device=self._device, keep_weights=keep
        )


def program_from(
    model: ir.Model,
    cut: str | None,
    names: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    keep_weights: bool = True,
) -> Program:
    """Return the part of a model from a cut value, or the graph's start, to some values.

    A value may depend on nothing but inputs of the graph, wherever it stands.
    """
    whole = subgraph_between(model, None, names)
    made = {value.name for node in whole.nodes for value in node.outputs}
    cuts = None if cut is None or cut not in made else [cut]
    return Program.from_subgraph(
        model, cuts, names, device=device, dtype=dtype, keep_weights=keep_weights
    )
