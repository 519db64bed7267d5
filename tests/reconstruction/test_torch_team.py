"""Two processes that learn together, started as torchrun starts them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.reconstruction.losses import LossTerms, total_loss
from qcompiler.reconstruction.window_training import _order
from qcompiler.team import Alone, owns
from tests.support.team_member import arrays_of, reconstruct

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("team")
    command = [*TORCHRUN, "-m", "tests.support.team_member", str(made)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return made


def _seen(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{rank}.json").read_text())
    return found


def test_both_end_with_what_one_alone_learns(folder: Path, tmp_path: Path) -> None:
    model, windows = reconstruct(Alone(), tmp_path)
    alone = arrays_of(model)
    first, second = (np.load(folder / f"{rank}.npz") for rank in (0, 1))
    assert set(first.files) == set(second.files) == set(alone)
    for name, expected in alone.items():
        np.testing.assert_array_equal(first[name], second[name])
        if name.endswith(".scale"):
            np.testing.assert_allclose(first[name], expected, rtol=1e-4)
        else:
            assert np.mean(first[name] != expected) < 1e-3
    seen = [_seen(folder, rank) for rank in (0, 1)]
    assert seen[0]["losses"] == seen[1]["losses"]
    losses = [[each.loss_before, each.loss_after] for each in windows]
    np.testing.assert_allclose(seen[0]["losses"], losses, rtol=1e-4)
    assert all(seen[0]["kept"])
    assert len(windows) == 2
    assert any(each.flipped for each in windows), "codes were learned, too"


def test_finished_windows_are_taken_up_by_both(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "windows").glob("0*.json")) == [
        "00000.json",
        "00001.json",
    ]
    assert all(_seen(folder, rank)["resumed"] for rank in (0, 1))


def test_sums_are_over_both(folder: Path) -> None:
    assert [_seen(folder, rank)["sum"] for rank in (0, 1)] == [[3.0, 3.0]] * 2


def test_what_fails_in_one_fails_in_both(folder: Path) -> None:
    first, second = (_seen(folder, rank)["refusals"] for rank in (0, 1))
    assert first["ours"] == second["ours"] == "ModelError: here: cannot (do)"
    assert second["theirs"] == "ValueError: what"
    assert first["theirs"] == "InternalError: process 1: failed with ValueError: what"
    assert first["none"] == second["none"] == "nothing"
    assert first["lead"] == "ModelError: cannot start"
    assert second["lead"] == "ModelError: process 0: cannot start"


def test_samples_that_differ_are_refused(folder: Path) -> None:
    for rank in (0, 1):
        words = _seen(folder, rank)["refusals"]["samples"]
        assert "process 1 reads another samples than process 0" in words
        assert "must be the same each time they are read" in words


def test_one_gpu_for_all_is_refused(folder: Path) -> None:
    heard = _seen(folder, 1)["refusals"]
    assert "several processes cannot share one GPU" in heard["gpu"]
    assert heard["own gpu"] == "cuda:1"


def test_processes_have_equally_much_to_do_in_every_step() -> None:
    class Two(Alone):
        size = 2

    for step in _order(range(11), 40, 4, seed=0):
        assert sum(owns(Two(), call) for call in step) == 2
    seen = [call for step in _order(range(8), 4, 2, seed=0) for call in step]
    assert sorted(seen) == list(range(8))


def test_which_calls_are_joined_makes_no_difference() -> None:
    random = torch.Generator().manual_seed(0)
    found, target = (torch.randn(6, 5, 3, generator=random) for _ in range(2))
    target[:2] *= 100
    keep = torch.rand(6, 5, generator=random) > 0.3
    terms = LossTerms(1.0, 0.5)
    joined = total_loss([found], [[target]], terms, keep, calls=3)
    single = [
        total_loss([found[at : at + 2]], [[target[at : at + 2]]], terms, keep[at : at + 2])
        for at in (0, 2, 4)
    ]
    torch.testing.assert_close(joined, torch.stack(single).mean())
