"""Engines of TensorRT-RTX in tests; without the library tests skip with the reason."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import onnx_ir as ir
import pytest

from qcompiler.export.engine_graph import EngineProduct, products_of

Shapes = Mapping[str, Sequence[Sequence[int]]]

requires_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="builds engines: pip install tensorrt-rtx-cu13",
)


@dataclass(frozen=True, slots=True)
class Built:
    """What became of a graph.

    Attributes:
        stage: "done", or where it failed: "parse", "build" or "crash".
        log: What the library said: errors and warnings.
        engine: The bytes, empty where it failed.
    """

    stage: str
    log: tuple[str, ...]
    engine: bytes = b""

    @property
    def products(self) -> tuple[EngineProduct, ...]:
        """The products of the engine."""
        return products_of(self.engine)


class RtxBuilder:
    """Builds engines, one after the other, in a process that is started again when it crashes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def build(
        self,
        model: ir.Model | Path,
        processors: Sequence[str] = ("SM89",),
        shapes: Shapes | None = None,
    ) -> Built:
        """Build an engine of a model.

        Args:
            model: The model, or its file.
            processors: What the engine is for.
            shapes: Least, usual and largest shape of inputs that vary.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = model if isinstance(model, Path) else Path(folder) / "model.onnx"
            if isinstance(model, ir.Model):
                ir.save(model, path)
            engine = Path(folder) / "engine"
            request = {
                "model": str(path.absolute()),
                "engine": str(engine),
                "processors": list(processors),
                "shapes": dict(shapes or {}),
            }
            used = self._process is not None
            answer = self._ask(json.dumps(request))
            if answer is None and used:
                # Rarely a process that has built many engines crashes where a fresh one, such as
                # the compiler starts for each, does not.
                answer = self._ask(json.dumps(request))
            if answer is None:
                return Built("crash", ())
            written = engine.read_bytes() if answer["stage"] == "done" else b""
        return Built(str(answer["stage"]), tuple(answer["log"]), written)

    def _ask(self, request: str) -> dict[str, list[str] | str] | None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.rtx_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            self._process = None
            return None
        return dict(json.loads(line))


@pytest.fixture(scope="module")
def rtx() -> Iterator[RtxBuilder]:
    """A builder of engines for the tests of a module."""
    with RtxBuilder() as builder:
        yield builder
