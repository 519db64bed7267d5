"""One process of a team, for tests: `python -m tests.support.team_member FOLDER` under torchrun.

Writes what it saw into FOLDER/RANK.json, and the weights it ended with into FOLDER/RANK.npz.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qcompiler.errors import ModelError, QCompilerError
from qcompiler.ir.provenance import annotate
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.passes.reconstruct.reconstruct_blocks import (
    ReconstructBlocks,
    ReconstructBlocksOptions,
)
from qcompiler.progress import SilentProgress
from qcompiler.quant.reconstruction import BlockReconstruction
from qcompiler.reconstruction.torch_team import TorchTeam, joined_team
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.window_record import WindowRewrite
from qcompiler.team import Team
from tests.support.graphs import build, initializer
from tests.support.reconstruction import decoder, samples_of, token_calls

HOW = BlockReconstruction(steps=12, batch=4, scale_rate=1e-2, code_rate=7e-3)


def planned_decoder() -> ir.Model:
    """Return a decoder of three layers whose products but the last get 2 bits."""
    text, weights = decoder(3)
    model = build(text, weights, opset=25)
    for node in model.graph:
        if node.op_type == "MatMul" and node.name and node.name != "head":
            annotate(node, scheme="w2a16:b16:asym")
    return model


def reconstruct(
    team: Team, folder: Path, *, skipped: int = 0
) -> tuple[ir.Model, list[WindowRewrite]]:
    """Learn the decoder's windows in a team, and return the model and what became of them."""
    calls = token_calls(12)[skipped:]
    windows = None if team.size == 1 else folder / "windows"
    options = ReconstructBlocksOptions(samples_of(calls), (InsertQdq(),), HOW, checkpoint=windows)
    own = folder / f"own-{team.rank}"
    own.mkdir(exist_ok=True)
    model = planned_decoder()
    with WeightStore(own) as store:
        context = PassContext(store, SilentProgress(), 1, team)
        result = ReconstructBlocks(options).run(model, context)
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy())
    return model, [each for each in result.rewrites if isinstance(each, WindowRewrite)]


def arrays_of(model: ir.Model) -> dict[str, Any]:
    """Return all codes and scales."""
    names = [name for name in model.graph.initializers if name.endswith((".codes", ".scale"))]
    return {name: initializer(model, name).astype(np.float32) for name in names}


def _heard(work: Callable[[], object]) -> str:
    """Return what is raised by some work, kind and words."""
    try:
        work()
    except (QCompilerError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _refusals(team: TorchTeam, folder: Path) -> dict[str, str]:
    """Return what this process hears when something goes wrong in one of them."""

    def raising(error: Exception, rank: int = team.rank) -> None:
        if team.rank == rank:
            raise error

    cannot, late = ModelError("cannot", where="here", hint="do"), ModelError("cannot start")
    return {
        "ours": _heard(lambda: team.agree(lambda: raising(cannot, 1))),
        "theirs": _heard(lambda: team.agree(lambda: raising(ValueError("what"), 1))),
        "none": _heard(lambda: team.agree(lambda: raising(ValueError("never"), 5))),
        "lead": _heard(lambda: team.lead(lambda: raising(late))),
        "samples": _heard(lambda: reconstruct(team, folder / "other", skipped=team.rank)),
        "gpu": _heard(lambda: team.device("cuda:1")),
        "own gpu": team.device("cuda"),
    }


def main(folder: Path) -> None:
    """Learn with the others, then fail with them."""
    torch.set_num_threads(1)
    with joined_team(int(os.environ["LOCAL_RANK"]), "cpu") as team:
        model, windows = reconstruct(team, folder)
        again, _ = reconstruct(team, folder)
        numbers = [torch.full((2,), float(team.rank + 1))]
        team.add_up(numbers)
        if team.rank == 0:
            (folder / "other").mkdir()
        team.agree(lambda: None)
        seen = {
            "refusals": _refusals(team, folder),
            "losses": [[each.loss_before, each.loss_after] for each in windows],
            "kept": [each.kept for each in windows],
            "resumed": all(
                np.array_equal(array, arrays_of(again)[name])
                for name, array in arrays_of(model).items()
            ),
            "sum": numbers[0].tolist(),
        }
    (folder / f"{team.rank}.json").write_text(json.dumps(seen))
    np.savez(folder / f"{team.rank}.npz", **arrays_of(model))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
