"""Gradients block by block are those of the whole graph, and signs do not cancel."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.calibration.task_calls import Task, TaskCall, TaskKind, task_of_outputs
from qcompiler.errors import ModelError, UsageError
from qcompiler.execution.torch import Program
from qcompiler.ir.blocks import find_blocks
from qcompiler.ir.quantizable import find_sites
from qcompiler.progress import SilentProgress
from qcompiler.reconstruction.gradients import GradientRun, Leaf, sum_gradients
from qcompiler.reconstruction.task_loss import loss_of
from qcompiler.reconstruction.tensor_files import TensorFiles
from tests.support.graphs import Array, build, random_array
from tests.support.reconstruction import samples_of

_TEXT = """g (float[N, 12] x) => (float[N, 5] logits) {
    [one] a = MatMul(x, w0)
    [act] b = Relu(a)
    [two] c = MatMul(b, w1)
    [three] d = MatMul(b, w2)
    e = Mul(c, d)
    [four] logits = MatMul(e, w3)
}"""
_SHAPES = ((12, 16), (16, 8), (16, 8), (8, 5))
_WEIGHTS = {f"w{at}": random_array(*shape, seed=at) / 4 for at, shape in enumerate(_SHAPES)}


def _labels(count: int, seed: int = 0) -> Task:
    data, classes = random_array(count, 12, seed=seed), np.arange(count) % 5
    calls = [TaskCall({"x": data[at : at + 1]}, classes[at : at + 1]) for at in range(count)]
    return Task(TaskKind.LABELS, "a test", count, lambda: iter(calls))


def _sum(
    model: ir.Model,
    task: Task,
    folder: Path,
    teacher: ir.Model | None = None,
    only: tuple[str, ...] = (),
    **run: Any,
) -> tuple[float, dict[str, Array]]:
    blocks = find_blocks(model)
    home = {node: block.index for block in blocks for node in block.nodes}
    leaves: dict[int, list[Leaf]] = {}
    for site in find_sites(model)[0]:
        name = site.weight.name or ""
        if not only or name in only:
            leaf = Leaf(name, name, partial(np.array, site.tensor.numpy()))
            leaves.setdefault(home[site.node], []).append(leaf)
    with TensorFiles(folder) as files:
        loss = sum_gradients(
            model,
            blocks,
            leaves,
            task,
            teacher or model,
            GradientRun(**run),
            files,
            SilentProgress(),
        )
        found = {leaf.name: files.get(leaf.name) for each in leaves.values() for leaf in each}
    return loss, found


def _whole(model: ir.Model, task: Task) -> tuple[float, dict[str, Array]]:
    """Return the same by differentiating the whole graph at once."""
    program = Program.from_subgraph(model, dtype=torch.float32)
    sums = {name: np.zeros_like(array) for name, array in _WEIGHTS.items()}
    total = 0.0
    for call in task.read():
        tensors = {n: torch.from_numpy(a).requires_grad_() for n, a in _WEIGHTS.items()}
        loss = loss_of(task, model)(program(call.feeds, weights=tensors), call, {})
        total += float(loss.detach())
        for name, each in zip(tensors, torch.autograd.grad(loss, [*tensors.values()]), strict=True):
            sums[name] += each.abs().numpy()
    return total / task.count, sums


@pytest.mark.parametrize("memory", [1, 1 << 20])
def test_blocks_give_what_the_whole_graph_does(memory: int, tmp_path: Path) -> None:
    model, task = build(_TEXT, _WEIGHTS), _labels(7)
    assert len(find_blocks(model)) == 3
    loss, found = _sum(model, task, tmp_path, memory=memory)
    expected_loss, expected = _whole(model, task)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name in _WEIGHTS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7)
    assert list(tmp_path.iterdir()) == []


def test_blocks_in_front_of_all_leaves_are_not_differentiated(tmp_path: Path) -> None:
    model, task = build(_TEXT, _WEIGHTS), _labels(3)
    _, found = _sum(model, task, tmp_path, only=("w3",))
    np.testing.assert_allclose(found["w3"], _whole(model, task)[1]["w3"], rtol=1e-5)


def test_signs_of_samples_do_not_cancel(tmp_path: Path) -> None:
    model = build(
        "g (float[N, 4] x) => (float[N, 2] y) { y = MatMul(x, w) }",
        {"w": np.eye(4, 2, dtype=np.float32)},
    )
    data = random_array(1, 4)

    def loss(outputs: dict[str, Any], feeds: dict[str, Any]) -> Any:
        return outputs["y"].sum() * next(signs)

    calls = [TaskCall({"x": data}, None)] * 2
    task = Task(TaskKind.FUNCTION, "f", 2, lambda: iter(calls), loss)
    signs = iter((1.0, -1.0))
    _, found = _sum(model, task, tmp_path)
    np.testing.assert_allclose(found["w"], np.repeat(2 * np.abs(data.T), 2, axis=1), rtol=1e-6)
    signs = iter((1.0, -1.0))
    _, signed = _sum(model, task, tmp_path, signed=True)
    assert not signed["w"].any()


def test_outputs_of_the_teacher_are_what_counts(tmp_path: Path) -> None:
    teacher = build(_TEXT, _WEIGHTS)
    task = task_of_outputs(samples_of([{"x": random_array(4, 12)}]))
    loss, found = _sum(teacher, task, tmp_path, teacher)
    # Next to itself a model has no divergence, and no gradient: it is least.
    assert loss == pytest.approx(0, abs=1e-6)
    assert max(np.abs(each).max() for each in found.values()) < 1e-5
    student = build(_TEXT, {n: w + random_array(*w.shape, seed=9) / 8 for n, w in _WEIGHTS.items()})
    loss, found = _sum(student, task, tmp_path, teacher)
    assert loss > 1e-3
    assert all(each.any() for each in found.values())


def test_a_lost_gradient_is_a_fault_of_the_model(tmp_path: Path) -> None:
    text = """g (float[N, 12] x) => (float[N, 5] y) {
        [one] a = MatMul(x, w0)
        r = Greater(a, a)
        f = Cast<to=1>(r)
        [four] y = MatMul(f, w3)
    }"""
    model = build(text, {"w0": _WEIGHTS["w0"], "w3": random_array(16, 5)})
    with pytest.raises(ModelError, match="no gradient passes"):
        _sum(model, _labels(2), tmp_path)


def test_losses_must_be_finite_and_fit(tmp_path: Path) -> None:
    model = build(_TEXT, {**_WEIGHTS, "w0": np.full((12, 16), np.nan, np.float32)})
    with pytest.raises(ModelError, match="the loss is nan"):
        _sum(model, _labels(1), tmp_path)
    call = TaskCall({"x": random_array(1, 12)}, np.zeros(3, np.int64))
    task = Task(TaskKind.LABELS, "", 1, lambda: iter([call]))
    with pytest.raises(UsageError, match="do not fit outputs"):
        _sum(build(_TEXT, _WEIGHTS), task, tmp_path)
    task = Task(TaskKind.FUNCTION, "my:loss", 1, lambda: iter([call]), lambda outputs, feeds: 1.0)
    with pytest.raises(UsageError, match="returns no scalar tensor"):
        _sum(build(_TEXT, _WEIGHTS), task, tmp_path)


def test_it_must_be_clear_which_output_holds_the_scores() -> None:
    model = build("g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y = Relu(x) z = Neg(x) }")
    with pytest.raises(UsageError, match="not clear which output"):
        loss_of(_labels(1), model)
