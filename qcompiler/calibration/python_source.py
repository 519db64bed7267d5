"""Samples from a Python function of the user's."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from qcompiler.calibration.calls import Feeds, SampleOptions, Samples, call_digest, counted
from qcompiler.calibration.signature import Signature
from qcompiler.errors import QCompilerError, UsageError
from qcompiler.function_reference import import_function

_END: Final = object()
_HINT: Final = "the function must return the same calls each time: seed what is random in it"


def open_function(reference: str, signature: Signature, options: SampleOptions) -> Samples:
    """Call `module:function`, which returns an iterable of maps of input names to arrays.

    The module is imported from the current folder or from where Python finds it. The function
    takes nothing, or one argument: a map of input names to `(numpy dtype, shape)`, symbolic
    dimensions as names or None. It is called anew for each reading and must be deterministic;
    every call is compared with its first reading by a hash.

    Raises:
        UsageError: It cannot be found, fails, or returns something else; on reading, that a call
            differs from the first reading.
    """
    function = import_function(reference, where="samples", example="my_data:calls")
    reader = _Reader(reference, function, signature, options.max_samples)
    count = reader.count()
    if not count:
        raise UsageError("returns no call", where=reference)  # noqa: EM101
    return Samples(f"{counted(count, 'call')} from {reference}", False, count, reader.read)


class _Reader:
    """Reads the function's calls, and holds every reading against the first."""

    def __init__(
        self,
        reference: str,
        function: Callable[..., Any],
        signature: Signature,
        limit: int | None,
    ) -> None:
        self._reference = reference
        self._function = function
        self._signature = signature
        self._limit = limit
        self._digests: list[bytes] = []
        self._count: int | None = None

    def count(self) -> int:
        """Return the number of calls, reading them all if the iterable has no length."""
        calls = self._call()
        if isinstance(calls, Sized):
            self._count = len(calls)
            if self._limit is not None:
                self._count = min(self._count, self._limit)
        else:
            self._count = sum(1 for _ in self._feeds(calls))
        return self._count

    def read(self) -> Iterator[Feeds]:
        """Yield the calls.

        Raises:
            UsageError: The function fails, or its calls differ from those of the first reading.
        """
        read = 0
        for feeds in self._feeds(self._call()):
            read += 1
            yield feeds
        if read != self._count:
            message = f"returns {counted(read, 'call')}, and returned {self._count} before"
            raise UsageError(message, where=self._reference, hint=_HINT)

    def _call(self) -> Iterable[Any]:
        with _users_code(self._reference):
            calls = self._function(*self._arguments())
        if isinstance(calls, Mapping) or not isinstance(calls, Iterable):
            message = f"returns {type(calls).__name__}, and not an iterable of calls"
            hint = "yield one {'input name': array} after the other"
            raise UsageError(message, where=self._reference, hint=hint)
        return calls

    def _arguments(self) -> tuple[Any, ...]:
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except (ValueError, TypeError):
            return ()
        if not any(p.default is p.empty and p.kind not in _VARIADIC for p in parameters):
            return ()
        return ({i.name: (i.dtype.numpy(), i.shape) for i in self._signature.inputs},)

    def _feeds(self, calls: Iterable[Any]) -> Iterator[Feeds]:
        with _users_code(self._reference):
            iterator = iter(calls)
        for index in itertools.count():
            if index == self._limit:
                return
            with _users_code(self._reference):
                call = next(iterator, _END)
            if call is _END:
                return
            feeds = self._check(call, f"{self._reference}, call {index}")
            self._compare(index, feeds)
            yield feeds

    def _check(self, call: object, where: str) -> Feeds:
        if not isinstance(call, Mapping):
            message = f"is {type(call).__name__}, and not a map of input names to arrays"
            raise UsageError(message, where=where)
        return self._signature.feeds({str(n): np.asarray(a) for n, a in call.items()}, where)

    def _compare(self, index: int, feeds: Feeds) -> None:
        digest = call_digest(feeds)
        if index == len(self._digests):
            self._digests.append(digest)
        elif index < len(self._digests) and digest != self._digests[index]:
            message = f"call {index} is not what it was when it was first read"
            raise UsageError(message, where=self._reference, hint=_HINT)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@contextmanager
def _users_code(reference: str) -> Iterator[None]:
    """Turn whatever the user's code raises into a UsageError."""
    try:
        yield
    except QCompilerError:
        raise
    except Exception as error:
        message = f"failed with {type(error).__name__}: {error}"
        raise UsageError(message, where=reference, hint="--traceback shows where") from error
