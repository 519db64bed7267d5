"""Several processes that torchrun started with one command: who they are, and who may speak."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.team import Alone, Team

if TYPE_CHECKING:
    from qcompiler.options import CompileOptions


def has_several() -> bool:
    """Whether torchrun started this process and others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def silence_followers(*, show_traceback: bool) -> None:
    """Leave the terminal to the first of several processes."""
    if has_several() and os.environ.get("RANK", "0") != "0":
        sys.stdout = StringIO()
        if not show_traceback:
            sys.stderr = StringIO()


@contextmanager
def leading_team(model: Path, options: "CompileOptions") -> Iterator[Team | None]:
    """Join the other processes, if there are any.

    Yields:
        The team that this process leads; None where it followed another one, and is done.

    Raises:
        UsageError: PyTorch is missing, or the others cannot be reached.
    """
    if not has_several():
        yield Alone()
        return
    from qcompiler.reconstruction.torch_team import joined_team

    with joined_team(int(os.environ.get("LOCAL_RANK", "0")), options.device) as team:
        if team.rank == 0:
            yield team
            return
        from qcompiler.following import follow

        follow(model, options, team)
        yield None
