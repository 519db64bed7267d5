"""Gradients of a task in a folder, so that compilations that differ elsewhere need them once."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.task_calls import Task
from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.weights import disk_errors, read_all
from qcompiler.reconstruction.gradients import GradientRun
from qcompiler.reconstruction.tensor_files import TensorFiles

_INDEX = "index.json"


class KeptGradients:
    """Sums of gradients by what decides them: task, graphs, every constant in these, device.

    Args:
        folder: An existing folder; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def key(
        self, task: Task, models: Iterable[ir.Model], names: Sequence[str], run: GradientRun
    ) -> str:
        """Return what stands for the gradients of a task by weights; empty where none are kept.

        Args:
            task: The task.
            models: The graph that is differentiated, and the one that it is compared with.
            names: The weights.
            run: How.
        """
        if self._folder is None:
            return ""
        digest = hashlib.sha256(repr((task.origin, task.fingerprint(), list(names))).encode())
        digest.update(repr((run.device, run.signed)).encode())
        for model in models:
            for node in all_nodes(model):
                digest.update(repr(_row(node)).encode())
            for graph in model.graphs():
                for name, value in graph.initializers.items():
                    tensor = value.const_value
                    assert tensor is not None
                    digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                    digest.update(np.ascontiguousarray(read_all(tensor)).tobytes())
        return digest.hexdigest()

    def load(self, key: str, files: TensorFiles) -> float | None:
        """Put what is kept under a key into files; returns the loss, None where nothing is.

        Raises:
            UsageError: The disk is full.
        """
        if self._folder is None or not (self._folder / key / _INDEX).exists():
            return None
        folder = self._folder / key
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        for at, name in enumerate(index["names"]):
            files.put(name, np.load(folder / f"{at}.npy", allow_pickle=False))
        return float(index["loss"])

    def keep(self, key: str, files: TensorFiles, names: Sequence[str], loss: float) -> None:
        """Keep what files hold under a key.

        Raises:
            UsageError: The disk is full.
        """
        if self._folder is None:
            return
        folder = self._folder / key
        present = [name for name in names if name in files]
        with disk_errors(self._folder):
            folder.mkdir(exist_ok=True)
            for at, name in enumerate(present):
                np.save(folder / f"{at}.npy", files.get(name), allow_pickle=False)
            # The index goes last: what it names is complete.
            text = json.dumps({"names": present, "loss": loss})
            (folder / _INDEX).write_text(text, encoding="utf-8")


def _row(node: ir.Node) -> tuple[object, ...]:
    read, made = (tuple(v and v.name for v in each) for each in (node.inputs, node.outputs))
    plain = (a for a in node.attributes.values() if not a.type.name.startswith("GRAPH"))
    return (node.domain, node.op_type, read, made, sorted(str(attribute) for attribute in plain))
