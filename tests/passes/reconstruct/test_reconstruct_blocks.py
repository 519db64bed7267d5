"""Codes and step sizes that are learned over windows, in the graph that insert-qdq makes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from qcompiler.calibration.calls import Feeds
from qcompiler.errors import UsageError
from qcompiler.ir.provenance import annotate, facts_of
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.passes.reconstruct.reconstruct_blocks import (
    ReconstructBlocks,
    ReconstructBlocksOptions,
)
from qcompiler.passes.reconstruct.round_weights import RoundWeights, RoundWeightsOptions
from qcompiler.progress import Advance
from qcompiler.quant.reconstruction import (
    BlockReconstruction,
    Compute,
    Learned,
    Rounding,
    Start,
)
from qcompiler.reconstruction.starting_point import edges
from qcompiler.reconstruction.window_training import WindowTrainer
from qcompiler.rewriting.base import PassContext, PassResult
from qcompiler.rewriting.window_record import WindowRewrite
from tests.support.graphs import build, initializer, node_named, random_array, serialized
from tests.support.parity import run_model
from tests.support.reconstruction import decoder, samples_of, token_calls
from tests.support.rewrites import assert_idempotent, run_pass

Array = npt.NDArray[Any]
SOFT = BlockReconstruction(
    steps=80, batch=2, rounding=Rounding.SOFT, scale_rate=1e-3, code_rate=5e-2, regularizer=1.0
)
QUICK = BlockReconstruction(steps=40, batch=2, scale_rate=1e-2, code_rate=2e-2)


def _planned(scheme: str = "w2a16:b16:asym", layers: int = 3, *, head: bool = False) -> ir.Model:
    text, weights = decoder(layers)
    model = build(text, weights, opset=25)
    for node in model.graph:
        if node.op_type == "MatMul" and node.name and (head or node.name != "head"):
            annotate(node, scheme=scheme)
    return model


def reconstructing(
    calls: Sequence[Feeds], how: BlockReconstruction = QUICK, **options: Any
) -> ReconstructBlocks:
    given = ReconstructBlocksOptions(samples_of(calls), (InsertQdq(),), how, **options)
    return ReconstructBlocks(given)


def windows_of(result: PassResult) -> list[WindowRewrite]:
    return [record for record in result.rewrites if isinstance(record, WindowRewrite)]


def _refused(result: PassResult) -> dict[str, str]:
    return {skip.node: skip.reason for skip in result.skips if skip.rule == "reconstruct-blocks"}


def outputs_error(model: ir.Model, truth: ir.Model, calls: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean squared error of the outputs over their mean square."""
    found = error = 0.0
    for feeds in calls:
        expected = next(iter(run_model(truth, feeds).values())).astype(np.float64)
        error += float(np.square(next(iter(run_model(model, feeds).values())) - expected).sum())
        found += float(np.square(expected).sum())
    return error / found


def rounded(model: ir.Model, calls: Sequence[Feeds], folder: Path) -> ir.Model:
    run_pass(RoundWeights(RoundWeightsOptions(samples_of(calls), (InsertQdq(),))), model, folder)
    return model


def test_outputs_are_nearer_than_those_of_gptq_with_the_same_nodes(tmp_path: Path) -> None:
    calls = token_calls(20)
    unseen = token_calls(26)[20:]
    truth, model = _planned(), _planned()
    start = rounded(_planned(), calls, tmp_path)
    result = run_pass(reconstructing(calls), model, tmp_path)
    assert edges(model) == edges(start)
    windows = windows_of(result)
    assert [w.window for w in windows] == [0, 1]
    for window in windows:
        assert window.kept
        assert window.loss_after < 0.9 * window.loss_before
        assert 0 < window.flipped < window.codes
        assert window.seconds > 0
        assert window.peak_bytes > 0
    assert outputs_error(model, truth, unseen) < 0.8 * outputs_error(start, truth, unseen)


@pytest.mark.parametrize(
    "how",
    [
        replace(QUICK, window=1, overlap=0, learned=Learned.STEP_SIZES, start=Start.NEAREST),
        replace(QUICK, learned=Learned.LORA, code_rate=5e-3),
        replace(SOFT, start=Start.NEAREST),
        replace(QUICK, homologous=True, kl=0.1),
        replace(QUICK, layers=False, window=3, overlap=2),
        replace(QUICK, window=9, overlap=0),
        replace(QUICK, compute=Compute.BFLOAT16),
        replace(QUICK, compute=Compute.FLOAT16),
        replace(QUICK, logits=True),
    ],
    ids=lambda how: " ".join(
        f"{name}={getattr(how, name)}"
        for name in how.__slots__
        if getattr(how, name) != getattr(QUICK, name)
    ),
)
def test_every_way_to_learn_brings_outputs_nearer(how: BlockReconstruction, tmp_path: Path) -> None:
    calls = token_calls(13)
    truth, model, start = _planned(layers=2), _planned(layers=2), _planned(layers=2)
    if how.start is Start.GPTQ:
        rounded(start, calls, tmp_path)
    else:
        run_pass(InsertQdq(), start, tmp_path)
    windows = windows_of(run_pass(reconstructing(calls, how), model, tmp_path))
    assert all(window.kept for window in windows)
    assert all(np.isfinite(window.loss_after) for window in windows)
    changed = any(window.flipped for window in windows)
    assert changed == (how.learned is not Learned.STEP_SIZES)
    unseen = token_calls(17)[13:]
    assert outputs_error(model, truth, unseen) < 0.97 * outputs_error(start, truth, unseen)


@pytest.mark.parametrize("scheme", ["w4a16:sym", "w4a16:b32:asym", "w3a16:sym", "w2a16:asym"])
def test_every_granularity_is_learned(scheme: str, tmp_path: Path) -> None:
    calls, calm = token_calls(12), replace(QUICK, code_rate=4e-3)
    truth, model, start = (_planned(scheme, layers=2) for _ in range(3))
    rounded(start, calls, tmp_path)
    result = run_pass(reconstructing(calls, calm), model, tmp_path)
    assert all(window.kept for window in windows_of(result))
    unseen = token_calls(16)[12:]
    assert outputs_error(model, truth, unseen) < outputs_error(start, truth, unseen)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for budget in (2 << 30, 0):
        model = _planned(layers=2)
        run_pass(reconstructing(token_calls(6), memory_budget=budget), model, tmp_path)
        made.append(serialized(model))
    assert made[0] == made[1]


class _StoppedError(Exception):
    """In place of a Ctrl-C."""


@pytest.mark.parametrize("learned", list(Learned))
def test_a_stopped_run_goes_on_to_the_same_bytes(
    learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, how = token_calls(4), replace(QUICK, steps=4, learned=learned)
    whole = _planned(layers=4)
    expected = windows_of(run_pass(reconstructing(calls, how), whole, tmp_path))
    assert len(expected) == 3
    folder = tmp_path / "windows"
    train = WindowTrainer.train
    trained: list[int] = []

    def stopping(self: WindowTrainer, *arguments: Any) -> None:
        if len(trained) == 2:
            raise _StoppedError
        trained.append(1)
        train(self, *arguments)

    monkeypatch.setattr(WindowTrainer, "train", stopping)
    with pytest.raises(_StoppedError):
        run_pass(reconstructing(calls, how, checkpoint=folder), _planned(layers=4), tmp_path)
    trained[:] = [1]
    model = _planned(layers=4)
    found = windows_of(run_pass(reconstructing(calls, how, checkpoint=folder), model, tmp_path))
    assert len(trained) == 2
    assert serialized(model) == serialized(whole)
    assert [w.loss_after for w in found] == [w.loss_after for w in expected]
    trained[:] = [1, 1]
    finished = _planned(layers=4)
    run_pass(reconstructing(calls, how, checkpoint=folder), finished, tmp_path)
    assert serialized(finished) == serialized(whole)


def test_windows_of_something_else_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "windows"
    how = replace(QUICK, steps=2)
    run_pass(reconstructing(token_calls(3), how, checkpoint=folder), _planned(layers=2), tmp_path)
    with pytest.raises(UsageError, match="windows of another samples"):
        run_pass(
            reconstructing(token_calls(4), how, checkpoint=folder), _planned(layers=2), tmp_path
        )
    other = replace(how, steps=3)
    with pytest.raises(UsageError, match="windows of another options"):
        run_pass(
            reconstructing(token_calls(3), other, checkpoint=folder), _planned(layers=2), tmp_path
        )
    model = _planned("w3a16:sym", layers=2)
    with pytest.raises(UsageError, match="windows of another model"):
        run_pass(reconstructing(token_calls(3), how, checkpoint=folder), model, tmp_path)
    (folder / "00000.npz").write_bytes(b"no archive")
    with pytest.raises(UsageError, match=r"00000\.npz is damaged"):
        run_pass(
            reconstructing(token_calls(3), how, checkpoint=folder), _planned(layers=2), tmp_path
        )
    with pytest.raises(UsageError, match="something else than finished windows"):
        run_pass(
            reconstructing(token_calls(3), how, checkpoint=tmp_path), _planned(layers=2), tmp_path
        )


def test_what_learning_makes_worse_is_left_as_it_was(tmp_path: Path) -> None:
    calls, wild = token_calls(8), replace(QUICK, scale_rate=3.0, code_rate=5.0, steps=4)
    model, start = _planned(layers=2), _planned(layers=2)
    rounded(start, calls, tmp_path)
    result = run_pass(reconstructing(calls, wild), model, tmp_path)
    (window,) = windows_of(result)
    assert not window.kept
    assert window.flipped == 0
    (reason,) = [skip.reason for skip in result.skips if skip.node == window.node]
    assert "on held-out calls its loss would have gone from" in reason
    for name in start.graph.initializers:
        np.testing.assert_array_equal(initializer(model, name), initializer(start, name))


def test_memory_that_does_not_suffice_halves_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    loss = WindowTrainer._loss

    def limited(self: WindowTrainer, batch: Any, *rest: Any) -> torch.Tensor:
        sizes.append(batch.calls)
        if batch.calls > 2:
            message = "too many"
            raise torch.OutOfMemoryError(message)
        return loss(self, batch, *rest)

    monkeypatch.setattr(WindowTrainer, "_loss", limited)
    how = replace(QUICK, batch=8, steps=3)
    made = []
    for _ in range(2):
        model = _planned(layers=2)
        run_pass(reconstructing(token_calls(16), how), model, tmp_path)
        made.append(serialized(model))
        monkeypatch.undo()
    assert {8, 4, 2} == set(sizes) - {1}
    assert len(made[0]) == len(made[1])


@pytest.mark.parametrize("logits", [False, True])
def test_blocks_run_one_by_one_where_one_call_does_not_fit(
    logits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited: list[bool] = []
    loss = WindowTrainer._loss

    def by_blocks_only(self: WindowTrainer, *arguments: Any) -> torch.Tensor:
        limited.append(self.parts is None)
        if self.parts is None:
            message = "too large at once"
            raise torch.OutOfMemoryError(message)
        return loss(self, *arguments)

    how = replace(QUICK, logits=logits, steps=3, batch=1)
    made = []
    for limit in (True, False):
        if limit:
            monkeypatch.setattr(WindowTrainer, "_loss", by_blocks_only)
        model = _planned(layers=3)
        result = run_pass(reconstructing(token_calls(8), how), model, tmp_path)
        assert any(window.kept for window in windows_of(result))
        made.append(serialized(model))
        monkeypatch.undo()
    assert set(limited) == {True, False}
    assert made[0] == made[1]


def test_one_call_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: WindowTrainer, *arguments: Any) -> torch.Tensor:
        message = "not even this"
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr(WindowTrainer, "_loss", never)
    with pytest.raises(UsageError, match="one call alone takes more memory"):
        run_pass(reconstructing(token_calls(4)), _planned(layers=2), tmp_path)


def test_shared_tables_and_weights_of_several_blocks_are_left_alone(tmp_path: Path) -> None:
    text, weights = decoder(2)
    text = text.replace("MatMul(last, whead)", "MatMul(last, turned)").replace(
        "[head]", "turned = Transpose<perm = [1, 0]>(table)\n[head]"
    )
    text = text.replace("wup1", "wup0")
    weights = {name: w for name, w in weights.items() if name not in ("whead", "wup1")}
    model = build(text, weights, opset=25)
    for node in model.graph:
        if node.name and (node.op_type == "MatMul" or node.name == "embed"):
            scheme = "w8a16:b16:sym" if node.name in ("head", "embed") else "w2a16:b16:asym"
            annotate(node, scheme=scheme)
    result = run_pass(reconstructing(token_calls(6)), model, tmp_path)
    refused = _refused(result)
    assert refused == dict.fromkeys(
        ("embed", "head", "up0", "up1"), "ops of several blocks read it"
    )
    assert "table.codes" in model.graph.initializers


def test_a_looked_up_table_is_left_alone(tmp_path: Path) -> None:
    model = _planned(layers=2)
    annotate(node_named(model, "embed"), scheme="w8a16:b16:sym")
    result = run_pass(reconstructing(token_calls(4), replace(QUICK, steps=2)), model, tmp_path)
    refused = _refused(result)
    assert "looked up one by one" in refused["embed"]


def test_quality_is_that_of_the_new_codes(tmp_path: Path) -> None:
    model = _planned("w4a16:b16:sym", layers=2)
    run_pass(reconstructing(token_calls(6)), model, tmp_path)
    node = node_named(model, "up0")
    facts = facts_of(node)
    assert "product_sqnr_db" not in facts
    weight = decoder(2)[1]["wup0"].astype(np.float64)
    scale = np.repeat(initializer(model, "wup0.scale").astype(np.float64), 16, axis=0)
    error = initializer(model, "wup0.codes").astype(np.float64) * scale - weight
    quality = 10 * np.log10(np.square(weight).sum() / np.square(error).sum())
    assert float(facts["weight_sqnr_db"]) == pytest.approx(quality, abs=1e-3)


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    rewrite = reconstructing(token_calls(3), replace(QUICK, steps=2))
    assert_idempotent(rewrite, _planned(layers=2), tmp_path)


def test_16_bit_floats_keep_their_type(tmp_path: Path) -> None:
    text, weights = decoder(2)
    text = text.replace("float[", "float16[")
    halves = {name: value.astype(np.float16) for name, value in weights.items()}
    model = build(text, halves, opset=25)
    for node in model.graph:
        if node.op_type == "MatMul" and node.name and node.name != "head":
            annotate(node, scheme="w3a16:b16:asym")
    (window,) = windows_of(run_pass(reconstructing(token_calls(8)), model, tmp_path))
    assert window.kept
    scale = model.graph.initializers["wup0.scale"].const_value
    assert scale is not None
    assert scale.dtype is ir.DataType.FLOAT16


def test_padding_does_not_count(tmp_path: Path) -> None:
    text = """g (float[N, T, 32] x, int64[N, T] attention_mask) => (float[N, T, 32] y) {
        [up] h = MatMul(x, w)
        [act] r = Relu(h)
        [down] y = MatMul(r, v)
    }"""
    weights = {"w": random_array(32, 48), "v": random_array(48, 32, seed=1)}
    mask = np.ones((2, 10), np.int64)
    mask[:, 7:] = 0
    found = []
    for noise in (0, 100):
        calls = [{"x": random_array(2, 10, 32, seed=at), "attention_mask": mask} for at in range(6)]
        for feeds in calls:
            feeds["x"][:, 7:] = noise
        model = build(text, weights, opset=25)
        for name in ("up", "down"):
            annotate(node_named(model, name), scheme="w2a16:b16:asym")
        run_pass(reconstructing(calls), model, tmp_path)
        found.append(serialized(model))
    assert found[0] == found[1]


def test_what_pytorch_cannot_differentiate_is_refused(tmp_path: Path) -> None:
    text = """g (float[N, 32] x) => (float[N, 3] y) {
        [up] h = MatMul(x, w)
        [act] n = Sign(h)
        [end] y = MatMul(n, e)
    }"""
    weights = {"w": random_array(32, 8), "e": random_array(8, 3)}
    model = build(text, weights, opset=25)
    annotate(node_named(model, "up"), scheme="w2a16:b16:asym")
    calls = [{"x": random_array(8, 32, seed=at)} for at in range(4)]
    result = run_pass(reconstructing(calls), model, tmp_path)
    assert not any(window.kept for window in windows_of(result))


class _Heard:
    """Remembers what progress was shown."""

    def __init__(self) -> None:
        self.tasks: dict[str, float] = {}
        self.done: dict[str, float] = {}

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        self.tasks[description] = total
        self.done[description] = 0

        def advance(amount: float) -> None:
            self.done[description] += amount

        yield advance


def test_progress_tells_losses_and_the_time_that_is_left(tmp_path: Path) -> None:
    heard, how = _Heard(), replace(QUICK, steps=3)
    context = PassContext(WeightStore(tmp_path), heard)
    result = reconstructing(token_calls(4), how).run(_planned(), context)
    windows = windows_of(result)
    assert heard.tasks["reconstructing blocks"] == 3 * len(windows)
    assert heard.done == heard.tasks
    (second,) = [name for name in heard.tasks if name.startswith("window 2 of 2")]
    assert "0 min left for all" in second
    first = windows[0]
    assert f"{first.loss_before:.3g} -> {first.loss_after:.3g}" in second
