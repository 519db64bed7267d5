"""Models run by PyTorch, where benchmarks would else open them in ONNX Runtime: on GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from benchmarks.runtime import Array, ModelSource
from qcompiler.execution.torch import Program


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a model, by its name."""

    name: str


class TorchSession:
    """A model on a device, with as much of an ONNX Runtime session as benchmarks use.

    What quantized weights stand for is computed from codes in every run, in float32.
    """

    def __init__(self, path: Path, device: str) -> None:
        """Load a model.

        Args:
            path: The `.onnx` file.
            device: As PyTorch calls it.
        """
        self._program = Program.from_subgraph(ir.load(path), device=device)

    def get_outputs(self) -> Sequence[Output]:
        """Return the outputs, in order."""
        return [Output(name) for name in self._program.output_names]

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """Run once; return some outputs, or all of them in order."""
        with torch.no_grad():
            found = self._program(dict(feeds))
        return [found[name].cpu().numpy() for name in names or self._program.output_names]


def source_on(path: Path, device: str) -> ModelSource:
    """Return what opens a model: on the CPU in ONNX Runtime, else in PyTorch."""
    return path if device == "cpu" else lambda: TorchSession(path, device)
