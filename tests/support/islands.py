"""A small classifier whose inputs come from one of two tasks, for tests of islands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.task_calls import Task, TaskCall, TaskKind, task_of_outputs
from qcompiler.ir.provenance import annotate
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.assign.assign_islands import AssignIslands, AssignIslandsOptions
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.passes.reconstruct.round_weights import RoundWeights, RoundWeightsOptions
from qcompiler.quant.islands import IslandBudget, IslandKind, IslandRequest, Saliency
from qcompiler.rewriting.base import PassContext, PassResult
from qcompiler.targets.registry import find_target
from tests.support.graphs import build, node_named
from tests.support.parity import run_model
from tests.support.reconstruction import samples_of

Array = npt.NDArray[Any]

TEXT = """g (float[N, 64] x) => (float[N, 10] logits) {
    [up] a = MatMul(x, w0)
    [act] b = Relu(a)
    [middle] c = MatMul(b, w1)
    [act2] d = Relu(c)
    [down] logits = MatMul(d, w2)
}"""
SHAPES = {"w0": (64, 96), "w1": (96, 64), "w2": (64, 10)}
WIDTHS = {"up": 96, "act": 96, "middle": 64, "act2": 64, "down": 10}
"""Output channels of every node."""
HALF = 32
"""Input channels that the first task uses; the second uses the others."""


def weights(seed: int) -> dict[str, Array]:
    """Return weights with heavy tails, as trained ones have."""
    generator = np.random.default_rng(seed)
    return {
        name: (generator.standard_t(3, shape) / np.sqrt(shape[0])).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def data(task: int, count: int, seed: int) -> Array:
    """Return rows that use one half of the input channels; a few of these are large."""
    generator = np.random.default_rng(100 * seed + task)
    found = generator.standard_normal((count, 64)) * 0.02
    active = generator.standard_normal((count, HALF)) * np.linspace(0.3, 2, HALF)
    found[:, task * HALF : (task + 1) * HALF] += active
    return found.astype(np.float32)


def planned(seed: int, scheme: str) -> ir.Model:
    """Return the classifier with a scheme on every op."""
    model = build(TEXT, weights(seed), opset=25)
    for name in ("up", "middle", "down"):
        annotate(node_named(model, name), scheme=scheme, rule="r", weight="w", weight_elements=1)
    for node in model.graph:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["N", WIDTHS[node.name or ""]])
    return model


def labelled(task: int, seed: int, count: int = 48) -> Task:
    """Return rows with the classes that the float classifier gives them."""
    rows = data(task, count, seed)
    classes = run_model(build(TEXT, weights(seed)), {"x": rows})["logits"].argmax(axis=1)
    calls = [TaskCall({"x": rows[at : at + 1]}, classes[at : at + 1]) for at in range(count)]
    return Task(TaskKind.LABELS, f"task {task}", count, lambda: iter(calls))


def calls_of(task: int, seed: int, count: int = 256) -> Samples:
    """Return calls for rounding."""
    rows: Sequence[Feeds] = [{"x": part} for part in np.split(data(task, count, seed), 4)]
    return samples_of(rows)


@dataclass(frozen=True)
class Setting:
    """One arm.

    Attributes:
        scheme: Of every weight.
        saliency: By what islands are chosen.
        kind: What they are made of.
        budget: What they may cost; None makes none.
        task: What they are for.
        outputs: Whether the task is what the float model returns, rather than its classes.
        seed: Of weights and data.
        signed: Whether gradients may cancel.
    """

    scheme: str = "w2a16:b16:asym"
    saliency: Saliency = Saliency.TACQ
    kind: IslandKind = IslandKind.WEIGHT
    budget: IslandBudget | None = None
    task: int = 0
    outputs: bool = False
    seed: int = 0
    signed: bool = False

    def fraction(self, fraction: float) -> "Setting":
        """Return this arm with so much of the weights in islands."""
        return replace(self, budget=IslandBudget(fraction=fraction))

    def islands(self) -> AssignIslands:
        """Return the pass."""
        assert self.budget is not None
        samples = calls_of(self.task, self.seed)
        task = task_of_outputs(samples) if self.outputs else labelled(self.task, self.seed)
        return AssignIslands(
            AssignIslandsOptions(
                IslandRequest(self.saliency, self.budget, self.kind),
                task,
                samples,
                (InsertQdq(),),
                find_target("onnxruntime"),
                signed=self.signed,
            )
        )

    def assigned(self, folder: Path) -> tuple[ir.Model, PassResult]:
        """Return the classifier with islands, in float, and what the pass said."""
        model = planned(self.seed, self.scheme)
        if self.budget is None:
            return model, PassResult()
        return model, self.islands().run(model, PassContext(WeightStore(folder)))

    def rounded(self, folder: Path) -> ir.Model:
        """Return the classifier with islands and codes."""
        model, _ = self.assigned(folder)
        options = RoundWeightsOptions(calls_of(self.task, self.seed), (InsertQdq(),))
        RoundWeights(options).run(model, PassContext(WeightStore(folder)))
        return model


def divergence(model: ir.Model, task: int, seed: int) -> float:
    """Return the mean divergence from the float classifier on rows that nothing was chosen on."""
    rows = data(task, 512, seed + 50)
    truth, found = (
        _log_softmax(run_model(each, {"x": rows})["logits"])
        for each in (build(TEXT, weights(seed)), model)
    )
    return float((np.exp(truth) * (truth - found)).sum(axis=1).mean())


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found
