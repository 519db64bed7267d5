"""Files that appear complete or not at all."""

import contextlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO, Self


class AtomicFile:
    """A file written under a temporary name in the folder of its final one.

    It is made when it is first used, and is gone when the context ends without `commit`.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._path = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._stream is not None:
            # Closing flushes, which fails again after a failed write; the file goes anyway.
            with contextlib.suppress(OSError):
                self._stream.close()
            self._path.unlink(missing_ok=True)

    def stream(self) -> BinaryIO:
        """Return the open file.

        Raises:
            OSError: The folder cannot be written.
        """
        if self._stream is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._stream = os.fdopen(os.open(self._path, flags, 0o666), "wb")
        return self._stream

    def commit(self) -> None:
        """Give the file its final name, in place of an older file.

        Raises:
            OSError: What is buffered cannot be written, or the name is taken by a folder.
        """
        self.stream().close()
        self._path.replace(self._target)
        self._stream = None
