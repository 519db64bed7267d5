"""Running TensorRT and TensorRT-RTX engines on the GPU of this machine.

The library runs in this process, PyTorch holds the memory. Types are those of TensorRT proper, and
checked where its stubs are at hand (`tests/export`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from qcompiler.errors import TargetError, UsageError
from qcompiler.export.to_tensorrt import LIBRARIES, EngineLibrary

if TYPE_CHECKING:
    import tensorrt
    import torch

Array: TypeAlias = "npt.NDArray[Any]"
_Tensors: TypeAlias = "dict[str, torch.Tensor]"

_TYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""Of the library, by their names, and what PyTorch calls them."""


class Library(Protocol):
    """What is taken from a module of TensorRT."""

    Logger: type[tensorrt.Logger]
    Runtime: type[tensorrt.Runtime]
    TensorIOMode: type[tensorrt.TensorIOMode]
    TensorLocation: type[tensorrt.TensorLocation]


def library_of(engine: Path) -> EngineLibrary:
    """Return the library that an engine is for: what its manifest says, else what is installed.

    Raises:
        UsageError: It is not installed, or the manifest names none that is known.
    """
    manifest = engine.with_name(f"{engine.name}.manifest.json")
    if manifest.is_file():
        try:
            name = json.loads(manifest.read_text(encoding="utf-8"))["library"]["name"]
            library = LIBRARIES[name]
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = "is no manifest of an engine"
            hint = "build the engine again, or remove the file"
            raise UsageError(message, where=str(manifest), hint=hint) from error
        candidates = [library]
    else:
        candidates = list(LIBRARIES.values())
    for library in candidates:
        if find_spec(library.module) is not None:
            return library
    titles = " or ".join(library.title for library in candidates)
    message = f"{titles} is not installed, so the engine cannot be run"
    hint = " or ".join(f"pip install 'qcompiler[{library.extra}]'" for library in candidates)
    raise UsageError(message, where=str(engine), hint=hint)


class EngineSession(AbstractContextManager["EngineSession"]):
    """An engine that was loaded, and can be run any number of times.

    Attributes:
        output_names: Names of the outputs, in order.
    """

    def __init__(self, path: Path, device: str = "cuda") -> None:
        """Load an engine.

        Args:
            path: The engine.
            device: Where PyTorch keeps what it reads and gives.

        Raises:
            UsageError: The library or PyTorch is not installed, or the file cannot be read.
            TargetError: There is no GPU that PyTorch can use, or the library refuses the engine.
        """
        library = library_of(path)
        self._title = library.title
        self._path = path
        self._torch, self._device = _torch_on(device, path)
        api: Any = import_module(library.module)
        self._load(api, _contents(path))

    def _load(self, api: Library, contents: bytes) -> None:
        self._logger = api.Logger(api.Logger.ERROR)
        self._runtime = api.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine(contents)
        if engine is None:
            message = f"{self._title} does not load this engine on this machine"
            hint = "build it here, or with the --sm of this GPU and this version of the library"
            raise TargetError(message, where=str(self._path), hint=hint)
        self._engine = engine
        self._context: tensorrt.IExecutionContext = engine.create_execution_context()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == api.TensorIOMode.INPUT]
        self._inputs = tuple(inputs)
        self.output_names = tuple(name for name in names if name not in inputs)
        self._on_host = {
            name for name in names if engine.get_tensor_location(name) == api.TensorLocation.HOST
        }

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the engine.

        Args:
            feeds: A value for every input; floats and integers are cast to the types it takes.

        Returns:
            The outputs by name; bfloat16 comes as float32.

        Raises:
            TargetError: A shape lies outside its profile, or the library fails.
            UsageError: An input is missing.
        """
        launch, outputs = self._prepared(feeds)
        launch()
        found: dict[str, Array] = {}
        for name, tensor in outputs.items():
            here = tensor.cpu()
            wide = here.float() if here.dtype == self._torch.bfloat16 else here
            found[name] = wide.numpy()
        return found

    def timed(self, feeds: Mapping[str, Array]) -> Callable[[], None]:
        """Return a run with its inputs on the GPU, which returns when the GPU has finished."""
        return self._prepared(feeds)[0]

    def _prepared(self, feeds: Mapping[str, Array]) -> tuple[Callable[[], None], _Tensors]:
        """Return what runs the engine, and the tensors that it then fills."""
        held = self._taken(feeds)
        outputs = {name: self._room_for(name) for name in self.output_names}
        for name, tensor in (held | outputs).items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        cuda = self._torch.cuda if self._device.type == "cuda" else None
        stream = None if cuda is None else cuda.Stream()

        def launch() -> None:
            # What this function holds lives as long as it: the library has addresses only.
            assert held or outputs
            if not self._context.execute_async_v3(0 if stream is None else stream.cuda_stream):
                message = f"{self._title} failed to run the engine"
                hint = "look at what trtexec --loadEngine says"
                raise TargetError(message, where=str(self._path), hint=hint)
            if stream is not None:
                stream.synchronize()

        if cuda is not None:
            cuda.synchronize()  # inputs are there before another stream reads them
        return launch, outputs

    def _taken(self, feeds: Mapping[str, Array]) -> _Tensors:
        """Return inputs where the engine reads them, and tell it their shapes."""
        found: _Tensors = {}
        for name in self._inputs:
            if name not in feeds:
                message = f"the engine reads {name}, which the samples do not have"
                raise UsageError(message, where=str(self._path), hint="give samples that have it")
            tensor = self._tensor(name, feeds[name])
            shape = tuple(tensor.shape)
            if not self._context.set_input_shape(name, shape):
                message = f"input {name} of shape {list(shape)} lies outside of its profile"
                hint = "build the engine with a --profile that holds it"
                raise TargetError(message, where=str(self._path), hint=hint)
            if name in self._on_host:
                # Shapes of outputs may be computed from what it holds.
                self._context.set_tensor_address(name, tensor.data_ptr())
            found[name] = tensor
        return found

    def _room_for(self, name: str) -> torch.Tensor:
        """Return a tensor for an output, whose shape follows from those of the inputs."""
        extents: Any = self._context.get_tensor_shape(name)  # a sequence, which stubs do not know
        shape = [int(extent) for extent in extents]
        if any(extent < 0 for extent in shape):
            message = f"the shape of output {name} depends on data"
            raise TargetError(message, where=str(self._path), hint="run it with trtexec")
        empty: torch.Tensor = self._torch.empty(
            shape, dtype=self._type(name), device=self._at(name)
        )
        return empty

    def _tensor(self, name: str, array: Array) -> torch.Tensor:
        wide = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        tensor = self._torch.from_numpy(np.ascontiguousarray(wide))
        placed: torch.Tensor = tensor.to(self._at(name)).to(self._type(name))
        return placed.contiguous()

    def _type(self, name: str) -> torch.dtype:
        kind = self._engine.get_tensor_dtype(name)
        known = _TYPES.get(str(kind).rpartition(".")[2])
        if known is None:
            message = f"{name} is of type {kind}, which cannot be handed over here"
            raise TargetError(message, where=str(self._path), hint="run it with trtexec")
        found: torch.dtype = getattr(self._torch, known)
        return found

    def _at(self, name: str) -> torch.device:
        return self._torch.device("cpu") if name in self._on_host else self._device

    def __exit__(self, *exception: object) -> None:
        # In this order: a context needs its engine, and an engine its runtime.
        del self._context, self._engine, self._runtime


def _torch_on(device: str, path: Path) -> tuple[Any, torch.device]:
    try:
        torch = import_module("torch")
    except ImportError as error:
        message = "running an engine needs PyTorch, which holds its data"
        raise UsageError(message, where=str(path), hint="pip install 'qcompiler[torch]'") from error
    try:
        return torch, torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        message = f"running an engine takes a GPU: {str(error).splitlines()[0]}"
        hint = "run this on the machine that the engine is for"
        raise TargetError(message, where=str(path), hint=hint) from error


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise UsageError(message, where=str(path), hint="name an engine that exists") from error
