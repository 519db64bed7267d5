"""Reading `.pt2` files of `torch.export.save` without running what they hold.

`torch.export.load` alone is no safe way to read a file of unknown origin. It unpickles weights,
constants and example inputs where the archive says so, hands the text of symbolic sizes to
SymPy's parser, which is Python's `eval`, loads compiled libraries, and looks operators up by any
name below `torch`. So the archive is read here first, and refused when it holds any of that:
what `torch.export.save` writes for a plain module holds none of it.
"""

import ast
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir

from qcompiler.errors import ModelError, UsageError
from qcompiler.export.from_torch import from_torch, require_torch

if TYPE_CHECKING:
    import torch

_HINT: Final = "read it only where you trust whoever made it: from_torch(torch.export.load(path))"
_PARTS: Final = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/[\w.]+"
    r"|\.format_version|\.storage_alignment"
    r"|models/[\w.-]+\.json|extra/.*"
    r"|data/weights/(weight_\d+|[\w.-]+_config\.json)"
    r"|data/constants/(tensor_\d+|[\w.-]+_config\.json)"
    r"|data/sample_inputs/[\w.-]+\.pt"
)
_OPERATOR: Final = re.compile(
    r"torch\.ops\.(aten|prim|prims)\.\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|wrap_with_set_grad_enabled"
    r"|wrap_with_autocast|invoke_subgraph)"
    r"|_operator\.(add|and_|eq|floordiv|ge|getitem|gt|invert|le|lshift|lt|mod|mul|ne|neg|not_|or_"
    r"|pos|pow|rshift|sub|truediv|xor)|math\.\w+|torch\.sym_\w+|torch\._sym_sqrt"
)
_FUNCTION: Final = re.compile(
    r"Abs|Add|And|BooleanFalse|BooleanTrue|CeilDiv|CeilToInt|CleanDiv|Eq|Equality|"
    r"False|FloatPow|FloatTrueDiv|Float|FloorDiv|FloorToInt|Ge|GreaterThan|Gt|"
    r"Identity|IntTrueDiv|Integer|IsNonOverlappingAndDenseIndicator|LShift|Le|LessThan|"
    r"Lt|Max|Min|Mod|ModularIndexing|Mul|Ne|Not|Or|Piecewise|Pow|PowByNatural|"
    r"PythonMod|RShift|Rational|Relational|RoundDecimal|RoundToInt|StrictGreaterThan|"
    r"StrictLessThan|Symbol|ToFloat|True|TruncToFloat|TruncToInt|Unequality|Where|"
    r"ceiling|floor"
)
_METHODS: Final = frozenset({"size", "stride", "storage_offset", "dim"})
_SYNTAX: Final = (
    *(ast.Expression, ast.Name, ast.Load, ast.Constant, ast.keyword),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.Tuple, ast.IfExp),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def from_exported_program(path: str | Path, **options: Any) -> ir.Model:
    """Export a `.pt2` file; `options` are those of `from_torch`.

    Raises:
        UsageError: There is no such file, or torch is not installed.
        ModelError: It is no `.pt2` file, holds what would run code, or cannot be exported.
    """
    return from_torch(load_exported_program(path), **options)


def load_exported_program(path: str | Path) -> "torch.export.ExportedProgram":
    """Load a `.pt2` file after looking at all of it that could run code.

    Raises:
        UsageError: There is no such file, or torch is not installed.
        ModelError: It is no `.pt2` file, or holds a pickle, a compiled library, text that is no
            arithmetic, or an operator that is not PyTorch's own.
    """
    require_torch()
    import torch

    path = Path(path)
    if not path.is_file():
        message = "there is no such file"
        raise UsageError(message, where=str(path), hint="name a file of torch.export.save")
    _refuse_code(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: torch.export.ExportedProgram = torch.export.load(path)
    except Exception as error:  # malformed files fail anywhere in the loader
        reason = " ".join(str(error).split())[:200]
        message = f"torch.export.load cannot read it: {type(error).__name__}: {reason}"
        hint = "save it again with the torch that is installed here"
        raise ModelError(message, where=str(path), hint=hint) from error
    return program


def _refuse_code(path: Path) -> None:
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            _check_parts(names, where)
            for name in names:
                if name.endswith(".json"):
                    _check_json(json.loads(archive.read(name)), f"{where}, {name}")
                elif name.endswith(".pt"):
                    _check_tensors(archive.read(name), f"{where}, {name}")
    except (zipfile.BadZipFile, UnicodeDecodeError, ValueError, RecursionError, OSError) as error:
        message = f"is no .pt2 file: {' '.join(str(error).split())[:200]}"
        raise ModelError(message, where=where, hint="save it with torch.export.save") from error


def _check_parts(names: list[str], where: str) -> None:
    roots = {name.partition("/")[0] for name in names}
    inside = [name.partition("/")[2] for name in names]
    if len(roots) != 1 or "archive_format" not in inside or not any("models/" in n for n in inside):
        message = "is no archive of torch.export.save"
        hint = "a .pt file of torch.save is a pickle: export the module in Python"
        raise ModelError(message, where=where, hint=hint)
    if len(set(names)) != len(names):
        message = "holds two parts of one name"
        raise ModelError(message, where=where, hint="save it again")
    for name in inside:
        if not _PARTS.fullmatch(name):
            message = f"holds {name}, which may run code when it is loaded"
            raise ModelError(message, where=where, hint=_HINT)


def _check_tensors(data: bytes, where: str) -> None:
    """Refuse a file of torch.save that is more than tensors, numbers and containers."""
    import torch

    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # it raises what its unpickler meets
        message = "the example inputs are more than tensors, and unpickling them may run code"
        raise ModelError(message, where=where, hint=_HINT) from error


def _check_json(document: Any, where: str) -> None:
    for entry in _dictionaries(document):
        if entry.get("use_pickle"):
            message = "holds a pickle, which may run code when it is loaded"
            raise ModelError(message, where=where, hint=_HINT)
        if {"target", "inputs", "metadata"} <= set(entry):
            _check_operator(entry["target"], where)
        expressions = [entry.get("expr_str", "0"), *entry.get("guards_code", ())]
        if not all(isinstance(text, str) and is_arithmetic(text) for text in expressions):
            message = "holds an expression that is more than arithmetic of sizes"
            raise ModelError(message, where=where, hint=_HINT)


def _check_operator(target: Any, where: str) -> None:
    if not isinstance(target, str) or not _OPERATOR.fullmatch(target):
        message = f"calls {str(target)[:100]}, which is no operator of PyTorch"
        hint = "decompose custom operators before saving: program.run_decompositions(...)"
        raise ModelError(message, where=where, hint=hint)


def _dictionaries(document: Any) -> Iterator[dict[str, Any]]:
    waiting = [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def is_arithmetic(text: str) -> bool:
    """Whether a Python expression only computes with numbers, sizes and names of symbols."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return all(_is_harmless(node, id(node) in called) for node in ast.walk(tree))


def _is_harmless(node: ast.AST, called: bool) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name | ast.Attribute)
    if isinstance(node, ast.Attribute):
        return called and node.attr in _METHODS
    if isinstance(node, ast.Name):
        return not called or _FUNCTION.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.isidentifier()
    return isinstance(node, _SYNTAX)
