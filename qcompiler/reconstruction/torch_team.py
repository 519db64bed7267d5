"""A team of processes that torchrun started, by torch.distributed.

Sums go through gloo on CPUs and NCCL on GPUs. What may fail is done before a sum, and whether it
failed is a sum of its own (`TorchTeam.agree`), so that nobody waits for a sum that will never
come. Long waits poll the store, since a process inside a sum hears no signal.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from qcompiler import errors
from qcompiler.errors import InternalError, QCompilerError, UsageError

_Result = TypeVar("_Result")

_LONGEST: Final = timedelta(days=1)
"""How far behind another a process may be."""
_POLLING: Final = 0.05
_GOODBYE: Final = 10.0
"""Seconds that the leading process waits for others to clean up."""
_OVER: Final = "over"


class TorchTeam:
    """One process of a run under torchrun."""

    def __init__(self, store: Store, rank: int, size: int, local_rank: int) -> None:
        """Take a place among processes whose group is initialized.

        Args:
            store: What all of them can read and write.
            rank: Number of this one.
            size: How many there are.
            local_rank: Number of this one on its machine: that of its GPU.
        """
        self._store = store
        self._local_rank = local_rank
        self._meetings = 0
        self._tasks = 0
        self._broken = False
        self.rank = rank
        self.size = size

    def device(self, name: str) -> str:
        """Return which device of its kind this process computes on.

        Raises:
            UsageError: One GPU is named for all.
        """
        kind, _, number = name.partition(":")
        if kind != "cuda":
            return name
        if number:
            message = "several processes cannot share one GPU"
            raise UsageError(message, where=name, hint="say cuda: each takes one of its own")
        return f"cuda:{self._local_rank}"

    def agree(self, work: Callable[[], _Result]) -> _Result:
        """Do work that may fail; where it fails in one process, it fails in all of them."""
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        self._meet(failure)
        return result

    def fail(self, error: Exception) -> None:
        """Tell the others, at what they agree on next, that this process cannot go on.

        Does nothing if they know that, or one of them cannot either.
        """
        if self._broken:
            return
        try:
            self._meet(error)
        except Exception:  # its own, or that of whoever failed first
            # torchrun ends all of them when one does, and the leading one has a message to write.
            deadline = time.monotonic() + _GOODBYE
            self._wait(lambda: self._store.check([_OVER]) or time.monotonic() > deadline)

    def lead(self, work: Callable[[], object]) -> None:
        """Do work in the leading process, however long it takes, while the others wait."""
        if self.rank:
            key = f"led {self._meetings}"
            self._wait(lambda: self._store.check([key]) or self._store.check([_OVER]))
            self._meet(None)
            return
        failure: Exception | None = None
        try:
            work()
        except Exception as error:
            failure = error
        self._store.set(f"led {self._meetings}", "done")
        self._meet(failure)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, which are equal in all of them."""
        with _connected():
            for tensor in tensors:
                dist.all_reduce(tensor)

    def take_over(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the leading process."""
        with _connected():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def announce(self, task: str) -> None:
        """Tell the others to begin a task."""
        self._store.set(f"task {self._tasks}", task)
        self._tasks += 1

    def listen(self) -> str | None:
        """Wait for the next task and return it; None where there is none any more."""
        key = f"task {self._tasks}"
        self._wait(lambda: self._store.check([key]) or self._store.check([_OVER]))
        if not self._store.check([key]):
            return None
        self._tasks += 1
        return str(self._store.get(key).decode())

    def done(self) -> None:
        """Say that this process has nothing left of the last task."""
        self._store.add(f"done {self._tasks - 1}", 1)

    def dismiss(self) -> None:
        """Wait for a moment until the others are done with what was announced."""
        if not self._tasks:
            return
        key, deadline = f"done {self._tasks - 1}", time.monotonic() + _GOODBYE
        self._wait(lambda: self._store.add(key, 0) >= self.size - 1 or time.monotonic() > deadline)

    def leave(self) -> None:
        """Go at once; others that wait for this process hear of it."""
        self._broken = True
        if not self.rank:
            self._store.set(_OVER, "over")
        if dist.is_initialized():
            dist.destroy_process_group()

    def _wait(self, until: Callable[[], bool]) -> None:
        while not until():
            time.sleep(_POLLING)

    def _meet(self, failure: Exception | None) -> None:
        """Hear whether anybody failed.

        Raises:
            QCompilerError: Somebody did; where it was this process, its own error.
        """
        key = f"failure {self._meetings}"
        self._meetings += 1
        if failure is not None:
            self._store.set(f"{key} {self.rank}", _written(failure))
        first = torch.tensor(self.size if failure is None else self.rank)
        with _connected():
            dist.all_reduce(first, dist.ReduceOp.MIN)
        self._broken = int(first) < self.size
        if failure is not None:
            raise failure
        if self._broken:
            raise _read(self._store.get(f"{key} {int(first)}").decode(), int(first))


@contextmanager
def _connected() -> Iterator[None]:
    """Say in our words that a process is gone."""
    try:
        yield
    except RuntimeError as error:
        message = f"another process of this run is gone: {str(error).splitlines()[0][:200]}"
        hint = "look at what it or torchrun says; too little memory is the usual cause"
        raise UsageError(message, hint=hint) from error


def _written(error: Exception) -> str:
    if not isinstance(error, QCompilerError):
        error = InternalError(f"failed with {type(error).__name__}: {error}")
    fields = ("message", "where", "hint", "reason")
    found = {name: getattr(error, name) for name in fields}
    return json.dumps({"kind": type(error).__name__, **found})


def _read(text: str, rank: int) -> QCompilerError:
    found = json.loads(text)
    kind = getattr(errors, found["kind"], QCompilerError)
    where = f"process {rank}" if found["where"] is None else found["where"]
    made: QCompilerError = kind(
        found["message"], where=where, hint=found["hint"], reason=found["reason"]
    )
    return made


@contextmanager
def joined_team(local_rank: int, device: str) -> Iterator[TorchTeam]:
    """Join the other processes that torchrun started, until the context ends.

    Args:
        local_rank: Number of this process on its machine.
        device: What is computed on: "cpu", or "cuda" for a GPU a process.

    Raises:
        UsageError: The others cannot be reached, or there is no GPU for this process.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu and local_rank >= torch.cuda.device_count():
        message = f"there are {torch.cuda.device_count()} GPUs, too few for a process each"
        raise UsageError(message, where=device, hint="start as many processes as there are GPUs")
    try:
        store, rank, size = next(rendezvous("env://", timeout=_LONGEST))
        if on_gpu:
            torch.cuda.set_device(local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=_LONGEST,
        )
    except (RuntimeError, ValueError) as error:
        message = f"the processes cannot reach each other: {str(error).splitlines()[0][:200]}"
        raise UsageError(message, hint="see the documentation of torchrun") from error
    team = TorchTeam(PrefixStore("team", store), rank, size, local_rank)
    try:
        yield team
    finally:
        team.leave()
