import numpy as np
import pytest

from qcompiler.calibration.fidelity import Fidelity, OutputFidelity
from qcompiler.execution.differences import Meaning
from tests.support.graphs import Array, random_array


def _of(truth: Array, found: Array, meaning: Meaning | None = None) -> OutputFidelity:
    fidelity = Fidelity({"y": meaning})
    for start in range(0, len(truth), 7):
        part = slice(start, start + 7)
        fidelity.add({"y": truth[part]}, {"y": found[part]}, len(truth[part]))
    return fidelity.outputs["y"]


def test_figures_are_those_of_the_definitions() -> None:
    truth, error = random_array(40, 3, 10), 0.1 * random_array(40, 3, 10, seed=1)
    found = truth + error
    output = _of(truth, found, Meaning.LOGITS)
    assert output.sqnr().value == pytest.approx(
        10 * np.log10((truth**2).sum() / (error**2).sum()), rel=1e-4
    )
    assert output.agreement().value == pytest.approx(
        (truth.argmax(-1) == found.argmax(-1)).mean(), rel=1e-6
    )
    flat = [each.reshape(40, -1) for each in (truth, found)]
    lengths = np.linalg.norm(flat[0], axis=1) * np.linalg.norm(flat[1], axis=1)
    assert output.cosine().value == pytest.approx(((flat[0] * flat[1]).sum(1) / lengths).mean())
    logs = [np.log(np.exp(e) / np.exp(e).sum(-1, keepdims=True)) for e in (truth, found)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    assert output.divergence().value == pytest.approx(kl, rel=1e-4)
    assert output.sqnr().samples == 40


def test_equal_outputs() -> None:
    truth = np.array([[1.0, np.nan], [np.inf, 2.0]], np.float32)
    output = _of(truth, truth)
    assert output.cosine().value == 1.0
    clean = _of(random_array(9, 4), random_array(9, 4))
    assert clean.sqnr().value == np.inf
    assert clean.agreement().value == 1.0
    assert not clean.is_distribution


def test_broken_outputs_are_as_far_as_can_be() -> None:
    truth = random_array(9, 4)
    spoiled = truth.copy()
    spoiled[3, 1] = np.nan
    assert _of(truth, spoiled).sqnr().value == -np.inf
    assert _of(truth, truth[:, :3]).sqnr().value == -np.inf
    assert _of(truth, truth[:, :3]).agreement().value == 0.0


def test_worsening_is_paired() -> None:
    truth = random_array(60, 10)
    near = truth + 0.1 * random_array(60, 10, seed=1)
    far = truth + 0.2 * random_array(60, 10, seed=1)
    then, now = _of(truth, near, Meaning.LOGITS), _of(truth, far, Meaning.LOGITS)
    lost = now.worsening("sqnr", then)
    assert lost.value == pytest.approx(20 * np.log10(2), rel=1e-3)
    assert lost.low is not None
    assert lost.low == pytest.approx(lost.value, abs=0.05)  # the same errors, twice as large
    for figure in ("cosine", "kl", "agreement"):
        assert now.worsening(figure, then).value > 0
        assert then.worsening(figure, then).value == 0.0
    assert then.worsening("sqnr", then).value == 0.0
    exact = _of(truth, truth)
    assert now.worsening("sqnr", exact).value == np.inf


def test_integer_outputs_are_left_out() -> None:
    fidelity = Fidelity({})
    fidelity.add({"ids": np.arange(3), "x": np.float32(2.0)}, {"ids": 1, "x": np.float32(2.0)}, 3)  # type: ignore[dict-item]
    assert list(fidelity.outputs) == ["x"]
