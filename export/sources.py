"""What `qcompile export` can read, and which reader it goes to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from qcompiler.errors import UsageError
from qcompiler.export.exported import Exported
from qcompiler.function_reference import import_function

_FUNCTION: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_OTHER_FILES: Final = {
    ".pt": "a pickle, or a TorchScript archive: neither is read",
    ".pth": "a pickle, which may run code",
    ".bin": "a pickle, which may run code",
    ".ckpt": "a pickle, which may run code",
    ".safetensors": "weights alone: name the folder that has their config.json",
    ".onnx": "an ONNX model already: compile it",
    ".py": "Python code: name MODULE:FUNCTION",
}
DTYPES: Final = ("float32", "float16", "bfloat16")


class SourceKind(StrEnum):
    """Kinds of sources."""

    PROGRAM = "a .pt2 file"
    FUNCTION = "a function"
    GGUF = "a .gguf file"
    CHECKPOINT = "a checkpoint of transformers"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a source is exported; None leaves it to the source.

    Attributes:
        task: What a checkpoint of transformers is exported for.
        with_cache: Whether a causal language model takes and returns keys and values.
        dtype: Type of weights and activations.
        input_names: Names of the graph's inputs.
        output_names: Names of the graph's outputs.
        opset: Version of the standard operators.
    """

    task: str | None = None
    with_cache: bool | None = None
    dtype: str | None = None
    input_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None
    opset: int = 21


def kind_of(source: str) -> SourceKind:
    """Return what a source is.

    Raises:
        UsageError: It is a file of a kind that is not read.
    """
    suffix = Path(source).suffix.lower()
    if Path(source).is_dir():
        return SourceKind.CHECKPOINT
    if suffix == ".pt2":
        return SourceKind.PROGRAM
    if suffix == ".gguf":
        return SourceKind.GGUF
    if suffix in _OTHER_FILES:
        message = f"is {_OTHER_FILES[suffix]}"
        hint = "name a .pt2 or .gguf file, MODULE:FUNCTION, or a checkpoint of transformers"
        raise UsageError(message, where=source, hint=hint)
    return SourceKind.FUNCTION if _FUNCTION.fullmatch(source) else SourceKind.CHECKPOINT


def read_source(source: str, options: ExportOptions) -> Exported:
    """Export what a source names.

    Args:
        source: A `.pt2` file, a `.gguf` file, `module:function`, a folder with a checkpoint of
            transformers, or its name on the hub. The function takes nothing and returns a module,
            its example inputs, and if need be its dynamic shapes, as `torch.export.export` has
            them.
        options: How.

    Raises:
        UsageError: The source or an option cannot be used, or a package is not installed.
        ModelError: The module cannot be exported.
    """
    kind = kind_of(source)
    if kind in (SourceKind.CHECKPOINT, SourceKind.GGUF):
        return _read_checkpoint(source, kind, options)
    for name, value in (("--task", options.task), ("--no-cache", options.with_cache)):
        if value is not None:
            message = f"{name} is for checkpoints, and {source} is {kind.value}"
            raise UsageError(message, where=name, hint="leave it out")
    return _read_program(source, options) if kind is SourceKind.PROGRAM else _call(source, options)


def _read_checkpoint(source: str, kind: SourceKind, options: ExportOptions) -> Exported:
    if options.input_names or options.output_names:
        message = "inputs and outputs of a checkpoint are named after its task"
        raise UsageError(message, where="--input-names", hint="leave the names out")
    common: dict[str, Any] = {
        "with_cache": options.with_cache is not False,
        "dtype": options.dtype or "float32",
        "opset": options.opset,
    }
    if kind is SourceKind.CHECKPOINT:
        from qcompiler.export.from_huggingface import from_huggingface

        return from_huggingface(source, options.task, **common)
    if options.task not in (None, "causal-lm"):
        message = f"a .gguf file holds a causal-lm model, no {options.task}"
        raise UsageError(message, where="--task", hint="leave it out")
    from qcompiler.export.from_gguf import from_gguf

    return from_gguf(source, **common)


def _read_program(source: str, options: ExportOptions) -> Exported:
    from qcompiler.export.by_position import ByPosition
    from qcompiler.export.exported_program import load_exported_program
    from qcompiler.export.from_torch import from_torch

    if options.dtype is not None:
        message = "a .pt2 file has its types fixed"
        raise UsageError(message, where="--dtype", hint="convert the module before torch.export")
    program = load_exported_program(source)
    model = from_torch(
        program,
        input_names=options.input_names,
        output_names=options.output_names,
        opset=options.opset,
    )
    positional, keywords = program.example_inputs or ((), {})
    # Without guards: they are Python text of the file.
    module = ByPosition(program.module(check_guards=False), positional, keywords)
    return Exported(model, module, (module.example,) if module.example else ())


def _call(source: str, options: ExportOptions) -> Exported:
    from qcompiler.export.from_torch import from_torch, require_torch

    require_torch()
    import torch

    from qcompiler.export.by_position import ByPosition

    function = import_function(source, where="SOURCE", example="my_models:small_cnn")
    try:
        made = function()
    except Exception as error:  # the user's code
        message = f"{source} failed: {type(error).__name__}: {error}"
        raise UsageError(message, where="SOURCE", hint="it is called without arguments") from error
    module, inputs, shapes = _parts(made, source)
    if options.dtype is not None:
        dtype = getattr(torch, options.dtype)
        module = module.to(dtype)
        inputs = torch.utils._pytree.tree_map(lambda value: _cast(value, dtype), inputs)
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    positional = () if keywords else inputs
    model = from_torch(
        module,
        positional,
        keywords,
        dynamic_shapes=shapes,
        input_names=options.input_names,
        output_names=options.output_names,
        opset=options.opset,
    )
    caller = ByPosition(module, positional, keywords)
    return Exported(model, caller, (caller.example,))


def _cast(value: Any, dtype: Any) -> Any:
    floating = hasattr(value, "is_floating_point") and value.is_floating_point()
    return value.to(dtype) if floating else value


def _parts(made: Any, source: str) -> tuple[Any, Any, Any]:
    import torch

    parts = made if isinstance(made, tuple) else (made,)
    hint = "return (module, example_inputs) or (module, example_inputs, dynamic_shapes)"
    if len(parts) not in (2, 3) or not isinstance(parts[0], torch.nn.Module):
        message = f"{source} returned {type(made).__name__}, which is no module with inputs"
        raise UsageError(message, where="SOURCE", hint=hint)
    if not isinstance(parts[1], tuple | list | Mapping):
        message = f"the example inputs of {source} are {type(parts[1]).__name__}"
        raise UsageError(message, where="SOURCE", hint="make them a tuple, one element an argument")
    inputs = parts[1] if isinstance(parts[1], Mapping) else tuple(parts[1])
    return parts[0], inputs, parts[2] if len(parts) == 3 else None
