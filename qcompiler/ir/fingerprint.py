"""Hashing a model and the files its weights lie in, beside other work."""

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Self

from qcompiler.ir.external_files import ExternalFiles, external_tensors
from qcompiler.ir.load import model_faults, read_proto

_CHUNK_BYTES: Final = 1 << 20


def fingerprint(path: str | Path, stop: threading.Event | None = None) -> str:
    """Return the SHA-256, in hex, of a model: its file and its external data files.

    The external files follow in order of their names as the model gives them; the size of each
    file precedes its bytes, so that no byte can move from one file to the next unnoticed.

    Args:
        path: The model file.
        stop: Set from another thread, it ends the reading early with an empty answer.

    Raises:
        UsageError: There is no such file.
        ModelError: It is no ONNX model, or external data is missing or outside its folder.
    """
    path = Path(path)
    found: dict[str, Path] = {}
    with model_faults(path):
        files = ExternalFiles(path)
        for owner, tensor in external_tensors(read_proto(path)):
            name, file = files.locate(owner, tensor)
            found[name] = file
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    for file in (path, *(found[name] for name in sorted(found))):
        digest.update(f"{file.stat().st_size}\n".encode())
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                if stop is not None and stop.is_set():
                    return ""
                digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


class BackgroundFingerprint(AbstractContextManager["BackgroundFingerprint"]):
    """Takes a fingerprint in a thread of its own; leaving the context early stops it."""

    def __init__(self, path: Path) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, "fingerprint")
        self._future: Future[str] = self._pool.submit(fingerprint, path, self._stop)

    def result(self) -> str:
        """Wait for the fingerprint and return it.

        Raises:
            UsageError, ModelError: As `fingerprint` does.
        """
        return self._future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True)
