"""Windows of blocks, and what is learned in each."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.blocks import Block
from qcompiler.ir.dataflow import constant_of, is_op
from qcompiler.ir.subgraph import subgraph_between
from qcompiler.reconstruction.starting_point import CodedWeight, StartingPoint


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks that are reconstructed together.

    Attributes:
        index: Position, from 0.
        start: Index of its first block.
        stop: One past that of its last block.
        leaving: One past the index of the last block that no later window holds.
    """

    index: int
    start: int
    stop: int
    leaving: int

    @property
    def left(self) -> range:
        """Blocks that no later window holds."""
        return range(self.start, self.leaving)

    @property
    def staying(self) -> range:
        """Blocks that the next window holds too."""
        return range(self.leaving, self.stop)


def cut_windows(first: int, last: int, size: int, overlap: int) -> list[Window]:
    """Return windows over the blocks `first` to `last`, both included.

    There are `ceil((L - size) / (size - overlap)) + 1` of them, one if `size >= L`; the last may
    hold fewer blocks.

    Args:
        first: Index of the first block.
        last: Index of the last one.
        size: Blocks in a window, at least 1.
        overlap: Blocks that a window shares with the one before, fewer than `size`.
    """
    windows: list[Window] = []
    start = first
    while start <= last:
        stop = min(start + size, last + 1)
        following = last + 1 if stop == last + 1 else stop - overlap
        windows.append(Window(len(windows), start, stop, following))
        start = following
    return windows


@dataclass(frozen=True, slots=True, eq=False)
class StepSize:
    """The scale of a quantized activation.

    Attributes:
        scale: Its initializer, of one element.
        home: Index of the block that all its readers lie in.
        bits: Of the codes.
    """

    scale: ir.Value
    home: int
    bits: int

    @property
    def name(self) -> str:
        """Name of the initializer."""
        return self.scale.name or ""


class Places:
    """Where the weights and step sizes of a model are learned.

    Attributes:
        blocks: The blocks that windows are made of.
        reasons: Why some weights keep their codes, as sentences.
    """

    def __init__(self, start: StartingPoint, blocks: Sequence[Block]) -> None:
        """Find the block of everything that can be learned.

        Args:
            start: The graph.
            blocks: A chain of blocks of it.
        """
        self.blocks = tuple(blocks)
        self.reasons: dict[CodedWeight, str] = {}
        self._weights: dict[int, list[CodedWeight]] = {}
        home = {node: block.index for block in blocks for node in block.nodes}
        for weight in start.weights:
            if reason := _why_not(weight, home):
                self.reasons[weight] = reason
            else:
                self._weights.setdefault(home[weight.sites[0].node], []).append(weight)
        self._steps: dict[int, list[StepSize]] = {}
        for step in _step_sizes(start.model, blocks):
            self._steps.setdefault(step.home, []).append(step)

    def weights(self, blocks: Collection[int]) -> list[CodedWeight]:
        """Return the weights that are learned in some blocks, in graph order."""
        return [weight for index in sorted(blocks) for weight in self._weights.get(index, ())]

    def step_sizes(self, blocks: Collection[int]) -> list[StepSize]:
        """Return the activations' step sizes that are learned in some blocks."""
        return [step for index in sorted(blocks) for step in self._steps.get(index, ())]

    def span(self) -> tuple[int, int] | None:
        """Return the first and the last block with a weight to learn; None without one."""
        return (min(self._weights), max(self._weights)) if self._weights else None


def _why_not(weight: CodedWeight, home: Mapping[ir.Node, int]) -> str:
    """Return why a weight keeps its codes, as a sentence; "" if it need not."""
    sites = weight.sites
    if any(site.node not in home for site in sites):
        return "it lies in the body of another node"
    if all(site.row.data is None for site in sites):
        return "its rows are looked up one by one, and for these the nearest codes are the best"
    if len({home[site.node] for site in sites}) > 1:
        return "ops of several blocks read it"
    recurrent = [s.row.op_type for s in sites if s.row.op_type in ("LSTM", "GRU", "RNN")]
    if recurrent:
        return f"a {recurrent[0]} multiplies what it computed itself the step before"
    return ""


def _step_sizes(model: ir.Model, blocks: Sequence[Block]) -> Iterator[StepSize]:
    """Yield the scales of quantized activations that only one block reads."""
    homes: dict[ir.Value, set[int]] = {}
    seen: dict[ir.Value, set[ir.Node]] = {}
    for block in blocks:
        starts = None if block.input is None else [block.input]
        ends = None if block.output is None else [block.output]
        for node in subgraph_between(model, starts, ends).nodes:
            if not is_op(node, "QuantizeLinear", "DequantizeLinear"):
                continue
            scale = node.inputs[1]
            if scale is not None and constant_of(scale) is not None:
                homes.setdefault(scale, set()).add(block.index)
                seen.setdefault(scale, set()).add(node)
    for scale, found in homes.items():
        readers = {use.node for use in scale.uses()}
        quantizes = any(is_op(node, "QuantizeLinear") for node in readers)
        tensor = constant_of(scale)
        is_one = tensor is not None and tensor.size == 1
        if is_one and quantizes and len(found) == 1 and readers == seen[scale]:
            yield StepSize(scale, next(iter(found)), min(map(_code_bits, readers)))


def _code_bits(node: ir.Node) -> int:
    """Return the bits of the codes that a QuantizeLinear makes or a DequantizeLinear reads."""
    codes = node.outputs[0] if is_op(node, "QuantizeLinear") else node.inputs[0]
    return 8 if codes is None or codes.dtype is None else codes.dtype.bitwidth
