"""Keeping intermediate models: dumps after every pass, and a reproducer when one fails."""

import json
from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.save import save_model
from qcompiler.progress import SilentProgress
from qcompiler.rewriting.base import Pass, PassResult

_LARGEST_REPRODUCER = 2 << 30


class DumpModels:
    """Writes the model after every pass: `DIR/00-inline-functions.onnx` and so on.

    Every file is a valid model: it loads in a runtime and can be given to `qcompile run-pass`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0

    def before_pass(self, model: ir.Model, rewrite: Pass) -> None:
        """Do nothing."""

    def after_pass(self, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        """Write the model."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{self._count:02d}-{rewrite.name}.onnx"
        save_model(model, path, progress=SilentProgress())
        self._count += 1

    def on_failure(self, rewrite: Pass, error: BaseException) -> str | None:
        """Do nothing: the dumps up to here are on disk."""
        return None


class KeepReproducer:
    """On a defect in a pass, keeps the model before it and the command that repeats it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._before: ir.Model | None = None

    def before_pass(self, model: ir.Model, rewrite: Pass) -> None:
        """Remember the model; tensors are shared, only the graph is copied."""
        self._before = model.clone()

    def after_pass(self, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        """Forget the model."""
        self._before = None

    def on_failure(self, rewrite: Pass, error: BaseException) -> str | None:
        """Write the model and the command."""
        if self._before is None:
            return None
        size = sum(
            value.const_value.nbytes
            for graph in self._before.graphs()
            for value in graph.initializers.values()
            if value.const_value is not None
        )
        if size > _LARGEST_REPRODUCER:
            return f"no reproducer was written, since the weights take {size / 2**30:.1f} GiB"
        folder = self._directory / f"qcompiler-reproducer-{rewrite.name}"
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self._before, folder / "model.onnx", progress=SilentProgress())
        command = f"qcompile run-pass {rewrite.name} model.onnx -o after.onnx"
        description = {
            "pass": rewrite.name,
            "options": repr(getattr(rewrite, "options", None)),
            "error": f"{type(error).__name__}: {error}",
            "command": command,
        }
        text = json.dumps(description, indent=2) + "\n"
        (folder / "reproduce.json").write_text(text, encoding="utf-8")
        return f"a defect in qcompiler; {folder} repeats it with `{command}`"
