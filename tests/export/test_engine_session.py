"""Running engines, with a library in place of TensorRT-RTX that reads and writes real memory."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qcompiler.errors import TargetError, UsageError
from qcompiler.export.engine_session import EngineSession, library_of

FAKE = '''
"""y = 2 x in float16, for up to 4 rows; n, on the host, is handed back as int64."""
import ctypes, enum
import numpy as np

class TensorIOMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1
class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1
class DataType(enum.Enum):
    HALF = 0
    INT64 = 1
    FP8 = 2
class Logger:
    ERROR = 1
    def __init__(self, severity): pass

KINDS = {"x": DataType.HALF, "n": DataType.INT64, "y": DataType.HALF, "m": DataType.INT64}

class Context:
    def __init__(self, engine): self.engine, self.shapes, self.at = engine, {}, {}
    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return name != "x" or shape[0] <= 4
    def get_tensor_shape(self, name):
        if self.engine.contents == b"unknown": return (-1,)
        return self.shapes["x" if name == "y" else "n"]
    def set_tensor_address(self, name, address): self.at[name] = address
    def array(self, name, like, kind):
        shape = self.shapes[like]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        memory = (ctypes.c_char * size).from_address(self.at[name])
        return np.frombuffer(memory, kind).reshape(shape)
    def execute_async_v3(self, stream):
        if self.engine.contents == b"fails": return False
        self.array("y", "x", np.float16)[...] = 2 * self.array("x", "x", np.float16)
        self.array("m", "n", np.int64)[...] = self.array("n", "n", np.int64)
        return True

class Engine:
    num_io_tensors = 4
    def __init__(self, contents): self.contents = contents
    def get_tensor_name(self, index): return "xnym"[index]
    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in "xn" else TensorIOMode.OUTPUT
    def get_tensor_location(self, name):
        return TensorLocation.HOST if name == "n" else TensorLocation.DEVICE
    def get_tensor_dtype(self, name):
        return DataType.FP8 if self.contents == b"fp8" else KINDS[name]
    def create_execution_context(self): return Context(self)

class Runtime:
    def __init__(self, logger): pass
    def deserialize_cuda_engine(self, contents):
        return None if contents == b"foreign" else Engine(contents)
'''


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "tensorrt_rtx.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    path = tmp_path / "model.engine"
    path.write_bytes(b"twice")
    manifest = {"library": {"name": "tensorrt-rtx", "version": "9.9"}}
    path.with_name("model.engine.manifest.json").write_text(json.dumps(manifest))
    yield path
    sys.modules.pop("tensorrt_rtx", None)


FEEDS = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "n": np.array([7], np.int32),
    "label": np.array([1, 2]),
}


def test_an_engine_reads_what_it_takes_and_gives_what_it_computes(engine: Path) -> None:
    with EngineSession(engine, device="cpu") as session:
        assert session.output_names == ("y", "m")
        for scale in (1, 3):  # anew each time, and not where the last call's data lay
            found = session.run({**FEEDS, "x": scale * FEEDS["x"]})
            assert found["y"].dtype == np.float16
            assert np.array_equal(found["y"], 2 * scale * FEEDS["x"])
            assert np.array_equal(found["m"], [7])


def test_what_is_timed_runs_with_data_that_is_there_already(engine: Path) -> None:
    with EngineSession(engine, device="cpu") as session:
        launch = session.timed(FEEDS)
        assert launch() is None
        assert launch() is None


@pytest.mark.parametrize(
    ("contents", "feeds", "kind", "says"),
    [
        (b"foreign", FEEDS, TargetError, "does not load this engine"),
        (b"fails", FEEDS, TargetError, "failed to run"),
        (b"fp8", FEEDS, TargetError, "of type DataType.FP8"),
        (b"unknown", FEEDS, TargetError, "the shape of output y depends on data"),
        (b"twice", {"x": FEEDS["x"]}, UsageError, "the engine reads n"),
        (
            b"twice",
            {**FEEDS, "x": np.zeros((5, 3), np.float32)},
            TargetError,
            r"shape \[5, 3\] lies outside of its profile",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(
    contents: bytes, feeds: dict[str, np.ndarray], kind: type[Exception], says: str, engine: Path
) -> None:
    engine.write_bytes(contents)

    def run() -> None:
        with EngineSession(engine, device="cpu") as session:
            session.run(feeds)

    with pytest.raises(kind, match=says):
        run()


def test_a_machine_without_the_gpu_is_told_so(engine: Path) -> None:
    with pytest.raises(TargetError, match="takes a GPU"):
        EngineSession(engine, device="cuda:99")


def test_the_library_is_that_of_the_manifest(engine: Path) -> None:
    assert library_of(engine).title == "TensorRT-RTX"
    manifest = engine.with_name("model.engine.manifest.json")
    manifest.write_text('{"library": {"name": "tensorrt"}}')
    with pytest.raises(UsageError, match="TensorRT is not installed"):
        library_of(engine)
    manifest.write_text('{"library": "tensorrt"}')
    with pytest.raises(UsageError, match="no manifest of an engine"):
        library_of(engine)
    manifest.unlink()
    assert library_of(engine).title == "TensorRT-RTX"
