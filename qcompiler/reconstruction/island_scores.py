"""Scores of weights that could have islands, from gradients and from what codes stand for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.task_calls import Task, TaskKind
from qcompiler.ir.weights import read_all
from qcompiler.progress import Progress
from qcompiler.quant.arithmetic import code_dtype, dequantize
from qcompiler.quant.islands import Saliency, error_cost, importance, saliency_scores
from qcompiler.reconstruction.gradients import GradientRun, Leaf, sum_gradients
from qcompiler.reconstruction.kept_gradients import KeptGradients
from qcompiler.reconstruction.starting_point import CodedWeight, StartingPoint
from qcompiler.reconstruction.tensor_files import TensorFiles

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Scoring:
    """How weights are scored.

    Attributes:
        measure: By what.
        task: What the model is to be good at; None where the measure needs no gradient.
        run: How gradients are computed.
        seed: Of the random measure.
        kept: Where gradients are kept and looked for.
    """

    measure: Saliency
    task: Task | None
    run: GradientRun = field(default_factory=GradientRun)
    seed: int = 0
    kept: KeptGradients = field(default_factory=lambda: KeptGradients(None))

    @property
    def at_codes(self) -> bool:
        """Whether the gradient is taken where the weights are what their codes stand for.

        A loss that compares with the float model has no gradient there: it is least. Of the
        quantized model it has one, and that times `W - Q` is what keeping a weight gains.
        """
        needed = self.measure.needs_gradient and self.task is not None
        return needed and self.task is not None and self.task.kind is TaskKind.OUTPUTS

    @property
    def needs_rounding(self) -> bool:
        """Whether weights must be rounded first: for their codes, or for their Hessians."""
        return self.measure.needs_codes or self.measure.needs_hessian or self.at_codes


class ScoredWeights:
    """Scores of some weights of a model, in files.

    Attributes:
        scores: By weight.
        loss: The mean loss of the task; None where no gradient was needed.
    """

    def __init__(self, scoring: Scoring, gradients: TensorFiles, scores: TensorFiles) -> None:
        """Start without scores; the files are the caller's to open and close."""
        self._scoring = scoring
        self._gradients = gradients
        self._of_channels: Mapping[str, Floats] = {}
        self.scores = scores
        self.loss: float | None = None

    def compute(
        self,
        start: StartingPoint,
        weights: Sequence[CodedWeight],
        of_channels: Mapping[str, Floats],
        progress: Progress,
    ) -> None:
        """Score weights of a Q/DQ graph.

        Args:
            start: The graph, with the codes that scores are to be of.
            weights: Some of its weights, each read in one block of the main graph.
            of_channels: By weight, what the squared error of an input channel costs, float32
                `[groups, K]`; weights that no sample reaches are not there.
            progress: Where it is shown.

        Raises:
            ModelError: The loss has no gradient.
            UsageError: The device cannot be used, or the disk is full.
        """
        scoring, self._of_channels = self._scoring, of_channels
        if scoring.measure.needs_gradient:
            self.loss = self._sum_gradients(start, weights, progress)
        for at, weight in enumerate(weights):
            values, slope = float_weight(weight), self._slope(weight)
            rounded = coded_values(weight) if scoring.measure.needs_codes else None
            seed = scoring.seed + at
            found = saliency_scores(scoring.measure, values, slope, rounded, seed)
            self.scores.put(weight.name, found)

    def _sum_gradients(
        self, start: StartingPoint, weights: Sequence[CodedWeight], progress: Progress
    ) -> float:
        scoring = self._scoring
        assert scoring.task is not None
        models = [start.original, *([start.model] if scoring.at_codes else [])]
        names = [weight.name for weight in weights]
        key = scoring.kept.key(scoring.task, models, names, scoring.run)
        known = scoring.kept.load(key, self._gradients)
        if known is not None:
            return known
        loss = sum_gradients(
            models[-1],
            start.blocks,
            leaves_of(start, weights, at_codes=scoring.at_codes),
            scoring.task,
            start.original,
            scoring.run,
            self._gradients,
            progress,
        )
        scoring.kept.keep(key, self._gradients, names, loss)
        return loss

    def importance(self, weight: CodedWeight, at: int) -> Floats:
        """Return what each element's error counts, whatever the codes; `at` is its number."""
        return importance(
            self._scoring.measure,
            float_weight(weight),
            self._slope(weight),
            self._scoring.seed + at,
        )

    def damage(self, importance: Floats, error: Floats) -> float:
        """Return what the errors of a weight cost, each element counting as much as that."""
        return float(np.sum(importance * error_cost(self._scoring.measure, error), dtype=float))

    def _slope(self, weight: CodedWeight) -> Floats | None:
        """Return what an error of each element costs, None where the measure does not ask."""
        if not self._scoring.measure.needs_hessian:
            return self._gradients.get(weight.name) if weight.name in self._gradients else None
        rows = weight.rows
        found = self._of_channels.get(weight.name)
        if found is None:
            return np.zeros(rows.shape, np.float32)
        return rows.restored(np.repeat(found, rows.count // rows.groups, axis=0))


def leaves_of(
    start: StartingPoint, weights: Sequence[CodedWeight], *, at_codes: bool
) -> dict[int, list[Leaf]]:
    """Return the weights to differentiate by, by block."""
    home = block_of_node(start)
    found: dict[int, list[Leaf]] = {}
    for weight in weights:
        value = weight.dequantized[0] if at_codes else weight.name
        read = partial(coded_values, weight) if at_codes else partial(read_all, weight.tensor)
        block = home[weight.sites[0].node]
        found.setdefault(block, []).append(Leaf(weight.name, value, read))
    return found


def block_of_node(start: StartingPoint) -> dict[ir.Node, int]:
    """Return the block of every node of a model's blocks."""
    return {node: block.index for block in start.blocks for node in block.nodes}


def float_weight(weight: CodedWeight) -> Floats:
    """Return a weight as it was, float32."""
    return np.array(read_all(weight.tensor), np.float32)


def coded_values(weight: CodedWeight) -> Floats:
    """Return what the codes of a weight stand for, float32."""
    kind = code_dtype(weight.spec.qtype)
    zero = None if weight.zero_point is None else _read(weight.zero_point).astype(kind)
    codes, scale = _read(weight.codes).astype(kind), _read(weight.scale)
    return dequantize(codes, scale, zero, weight.spec.granularity).astype(np.float32)


def _read(value: ir.Value) -> npt.NDArray[np.generic]:
    tensor = value.const_value
    assert tensor is not None
    return read_all(tensor)
