"""What the importers of checkpoints return."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.ir.atomic_file import AtomicFile
from qcompiler.ir.weights import disk_errors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that belongs beside a model: its tokenizer or its configuration.

    Attributes:
        name: File name, without a folder.
        data: What is in it.
    """

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Exported:
    """A checkpoint as a graph, with what is needed to check and to use it.

    Attributes:
        model: The graph; its weights are those of `module`, not copies of them.
        module: What was exported: takes the graph's inputs by position, and returns a tuple of
            its outputs.
        examples: Calls to compare the two with: tensors in the order of the graph's inputs, of
            several shapes. The first one was exported with.
        files: Tokenizer and configuration.
        notes: What the user must know about the result, a sentence each.
    """

    model: ir.Model
    module: "torch.nn.Module"
    examples: tuple[tuple["torch.Tensor", ...], ...]
    files: tuple[SideFile, ...] = ()
    notes: tuple[str, ...] = ()

    def write_files(self, folder: Path) -> tuple[Path, ...]:
        """Write the files into a folder that exists; what has one of the names is replaced.

        Raises:
            UsageError: The folder cannot be written, or the disk is full.
        """
        paths = tuple(folder / file.name for file in self.files)
        with disk_errors(folder):
            for path, file in zip(paths, self.files, strict=True):
                with AtomicFile(path) as target:
                    target.stream().write(file.data)
                    target.commit()
        return paths
