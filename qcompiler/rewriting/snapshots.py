"""Keeping intermediate models: dumps after every pass, and a reproducer when one fails."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.errors import ParityError, QCompilerError
from qcompiler.ir.save import save_model
from qcompiler.ir.weights import constant_bytes
from qcompiler.progress import SilentProgress
from qcompiler.rewriting.base import Pass, PassResult

_LARGEST_REPRODUCER = 2 << 30
_MOST_NODES = 3000


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
    """On a defect in a pass, keeps the model before it and the command that repeats it.

    The folder `qcompiler-reproducer-NAME` gets `model.onnx`, `reproduce.json`, and `recipe.toml`
    where there is a recipe. The command is to be run in that folder.

    Args:
        directory: Where the folder goes.
        arguments: Options of `qcompile run-pass` that make the pass what it was, beside the
            recipe: `("--target", "onnxruntime", "--weight-range", "mse")`.
        recipe: The recipe as TOML, or None.
    """

    def __init__(
        self, directory: Path, arguments: Sequence[str] = (), recipe: str | None = None
    ) -> None:
        self._directory = directory
        self._arguments = tuple(arguments)
        self._recipe = recipe
        self._before: ir.Model | None = None

    def before_pass(self, model: ir.Model, rewrite: Pass) -> None:
        """Remember the model; tensors are shared, only the graph is copied.

        A large graph is not: a copy before every pass would take most of the compilation.
        """
        small = sum(1 for _ in model.graph.all_nodes()) <= _MOST_NODES
        self._before = model.clone() if small else None

    def after_pass(self, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        """Keep the model: a hook after this one may still find the pass wrong."""

    def on_failure(self, rewrite: Pass, error: BaseException) -> str | None:
        """Write the model, the recipe and the command."""
        if self._before is None:
            return f"no reproducer was kept, since the graph has more than {_MOST_NODES} nodes"
        size = constant_bytes(self._before)
        if size > _LARGEST_REPRODUCER:
            return f"no reproducer was written, since the weights take {size / 2**30:.1f} GiB"
        folder = self._directory / f"qcompiler-reproducer-{rewrite.name}"
        command = self._command(rewrite)
        try:
            self._write(folder, self._before, _description(rewrite, error, command))
        except (OSError, QCompilerError) as failure:
            return f"no reproducer was written: {failure}"
        if isinstance(error, ParityError):
            return f"{folder} has the model before the pass; there, `{command}` makes the one after"
        return f"a defect in qcompiler; in {folder}, `{command}` repeats it"

    def _command(self, rewrite: Pass) -> str:
        recipe = () if self._recipe is None else ("--recipe", "recipe.toml")
        start = ("qcompile", "run-pass", rewrite.name, "model.onnx", "-o", "after.onnx")
        return shlex.join((*start, *recipe, *self._arguments))

    def _write(self, folder: Path, model: ir.Model, description: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, folder / "model.onnx", progress=SilentProgress())
        if self._recipe is not None:
            (folder / "recipe.toml").write_text(self._recipe, encoding="utf-8")
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (folder / "reproduce.json").write_text(text, encoding="utf-8")


def _description(rewrite: Pass, error: BaseException, command: str) -> dict[str, Any]:
    return {
        "pass": rewrite.name,
        "options": _plain_options(rewrite.options),
        "error": f"{type(error).__name__}: {error}",
        "command": command,
    }


def _plain_options(options: object | None) -> Any:
    """Return options as JSON has them: fields of a dataclass by name, its tables by their names."""
    if dataclasses.is_dataclass(options) and not isinstance(options, type):
        fields = dataclasses.fields(options)
        return {field.name: _plain(getattr(options, field.name)) for field in fields}
    return _plain(options)


def _plain(value: object) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    name = getattr(value, "name", None)
    return name if isinstance(name, str) else repr(value)
