"""Sharing `reconstruct-blocks` with the other processes of a run.

The leading process compiles as if it were alone. Where it comes to that pass it writes the model
as it is by then into a folder, and the others, which have waited, load it and run the same pass:
the graph is the only state. What a pass before decided by measuring is decided once.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from qcompiler.errors import QCompilerError, UsageError
from qcompiler.ir.fingerprint import fingerprint
from qcompiler.ir.load import load_model
from qcompiler.ir.save import save_model
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions, Reconstruction
from qcompiler.passes.reconstruct.reconstruct_blocks import ReconstructBlocks
from qcompiler.pipeline import pass_named
from qcompiler.plan import Plan, make_plan, with_data
from qcompiler.progress import SilentProgress
from qcompiler.rewriting.base import Pass, PassContext, PassResult
from qcompiler.team import Team

if TYPE_CHECKING:
    from qcompiler.reconstruction.torch_team import TorchTeam

_MODEL: Final = "model.onnx"


def require_shareable(plan: Plan, team: Team) -> None:
    """Refuse a compilation in which there is nothing to do for several processes.

    Raises:
        UsageError: No blocks are reconstructed, or there are more processes than calls in a step.
    """
    if team.size == 1:
        return
    if plan.reconstruct is not Reconstruction.CBQ:
        message = f"{team.size} processes were started, and only learning over windows is shared"
        raise UsageError(message, hint="give --reconstruct cbq, or start one process")
    if plan.blocks.batch < team.size:
        message = f"{team.size} processes cannot share steps of {plan.blocks.batch} calls"
        hint = f"give --calls-per-step {team.size}, or a multiple; fewer --steps then do as well"
        raise UsageError(message, hint=hint)


class HandOver:
    """Gives the model to the other processes where they are needed: a hook of the pass manager.

    Args:
        team: The processes.
        folder: A folder that all of them see, which is removed after the run.
        windows: Where finished windows are kept.
    """

    def __init__(self, team: Team, folder: Path, windows: Path) -> None:
        self._team = team
        self._folder = folder
        self._windows = windows

    def before_pass(self, model: ir.Model, rewrite: Pass) -> None:
        """Write the model and call the others, before the pass that is shared."""
        if self._team.size == 1 or rewrite.name != ReconstructBlocks.name:
            return
        folder = self._folder / "shared"
        folder.mkdir()
        save_model(model, folder / _MODEL, progress=SilentProgress(), external_data=True)
        task = {"folder": str(folder.absolute()), "windows": str(self._windows.absolute())}
        self._team.announce(json.dumps(task))

    def after_pass(self, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        """Do nothing."""

    def on_failure(self, rewrite: Pass, error: BaseException) -> str | None:
        """Keep nothing."""


@contextmanager
def leading(team: Team) -> Iterator[None]:
    """Let the others go where this process fails, and wait until they have cleaned up."""
    try:
        yield
    except BaseException:
        team.leave()
        raise
    finally:
        team.dismiss()


def follow(source: Path, options: CompileOptions, team: "TorchTeam") -> None:
    """Do this process's share of the compilation that the leading process runs.

    Args:
        source: The source model.
        options: Those of the leading process.
        team: The processes.

    Where the compilation fails, here or elsewhere, the leading process says why.

    Raises:
        Exception: A defect in qcompiler shows in this process.
    """
    try:
        plan = make_plan(options)
        require_shareable(plan, team)
        plan = with_data(plan, load_model(source), lambda: fingerprint(source))
        while (task := team.listen()) is not None:
            _share(json.loads(task), plan, options, team)
    except Exception as error:
        team.fail(error)
        if not isinstance(error, QCompilerError):
            raise


def _share(task: dict[str, str], plan: Plan, options: CompileOptions, team: "TorchTeam") -> None:
    own = Path(task["folder"]) / f"process-{team.rank}"
    try:
        own.mkdir()
        with WeightStore(own) as store:
            context = PassContext(store, SilentProgress(), options.workers or 1, team)
            plan = replace(plan, windows=Path(task["windows"]))
            model = load_model(own.parent / _MODEL)
            pass_named(ReconstructBlocks.name, plan).run(model, context)
    except OSError as error:
        message = f"process {team.rank} cannot use the folder that all share: {error.strerror}"
        hint = "write to a disk that all have"
        raise UsageError(message, where=task["folder"], hint=hint) from error
    finally:
        shutil.rmtree(own, ignore_errors=True)
        team.done()
