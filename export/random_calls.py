"""Calls of a module: given ones, and random ones like them."""

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.export.from_torch import DYNAMIC_AXES, inference_mode

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

_LARGEST_GROWTH: Final = 2


class Calls:
    """Makes the values of calls, and the module's results for them.

    Args:
        model: The module's graph; its inputs name the dynamic axes.
        module: The module.
        random_calls: How many random calls follow each given one.
        vary_lengths: Whether these have other lengths.
        seed: Of the values and lengths.
    """

    def __init__(
        self, model: ir.Model, module: Any, random_calls: int, vary_lengths: bool, seed: int
    ) -> None:
        self._shapes = [value.shape for value in model.graph.inputs]
        noted = model.graph.metadata_props.get(DYNAMIC_AXES, "{}") if vary_lengths else "{}"
        self._axes: dict[str, tuple[int, int | None]] = {
            name: (bounds[0], bounds[1]) for name, bounds in json.loads(noted).items()
        }
        self._module = module
        self._count = random_calls
        self._random = np.random.default_rng(seed)

    def of(self, call: Any) -> Iterator[tuple[list[Array], list[Array]]]:
        """Yield inputs and the module's outputs, flat: for the call, then for random ones."""
        from torch.utils import _pytree as pytree

        arguments = ((), dict(call)) if isinstance(call, Mapping) else (tuple(call), {})
        flat, spec = pytree.tree_flatten(arguments)
        yield _arrays(flat), self._run(flat, spec)
        for _ in range(self._count):
            yield self._random_call(flat, spec)

    def _random_call(self, flat: list[Any], spec: Any) -> tuple[list[Array], list[Array]]:
        lengths = self._lengths(flat)
        values = self._values(flat, lengths)
        try:
            return _arrays(values), self._run(values, spec)
        except Exception:  # the module does not take these lengths
            if not lengths:
                raise
            values = self._values(flat, {})
            return _arrays(values), self._run(values, spec)

    def _run(self, flat: list[Any], spec: Any) -> list[Array]:
        import torch
        from torch.utils import _pytree as pytree

        positional, keywords = pytree.tree_unflatten(flat, spec)
        with torch.no_grad(), inference_mode(self._module):
            result = self._module(*positional, **keywords)
        return _arrays(pytree.tree_leaves(result))

    def _lengths(self, flat: Sequence[Any]) -> dict[str, int]:
        """Return new lengths of the dynamic axes, from 1 to twice the given ones."""
        given: dict[str, int] = {}
        for value, shape in zip(_tensors(flat), self._shapes, strict=False):
            for size, dim in zip(value.shape, shape or (), strict=False):
                if isinstance(dim, ir.SymbolicDim) and dim.value in self._axes:
                    given.setdefault(dim.value, size)
        lengths = {}
        for name, size in sorted(given.items()):
            low, high = self._axes[name]
            most = size * _LARGEST_GROWTH + 1
            most = most if high is None else min(most, high)
            least = max(1, low)
            lengths[name] = int(self._random.integers(least, max(least, most) + 1))
        return lengths

    def _values(self, flat: Sequence[Any], lengths: Mapping[str, int]) -> list[Any]:
        shapes = iter(self._shapes)
        return [
            self._like(value, next(shapes, None), lengths) if _is_tensor(value) else value
            for value in flat
        ]

    def _like(
        self, tensor: "torch.Tensor", shape: ir.Shape | None, lengths: Mapping[str, int]
    ) -> "torch.Tensor":
        import torch

        values: Array
        sizes = [
            _length(dim, size, lengths)
            for dim, size in zip(shape or tensor.shape, tensor.shape, strict=False)
        ]
        if tensor.numel() == 0:
            values = self._random.standard_normal(sizes)
        elif tensor.is_floating_point():
            spread = float(tensor.double().std(correction=0)) or 1.0
            values = self._random.normal(float(tensor.double().mean()), spread, sizes)
        else:
            low, high = int(tensor.min()), int(tensor.max())
            values = self._random.integers(low, high + 1, sizes)
        return torch.as_tensor(values).to(tensor.dtype).to(tensor.device)


def _length(dim: Any, size: int, lengths: Mapping[str, int]) -> int:
    """Return the length of an axis of a random input; the given one where it follows no name."""
    if not isinstance(dim, ir.SymbolicDim) or not dim.value:
        return size
    try:
        return _evaluate(ast.parse(dim.value, mode="eval").body, lengths)
    except (SyntaxError, KeyError, ValueError):
        return size


_OPERATIONS: Final[Mapping[type[ast.operator], Callable[[int, int], int]]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
}


def _evaluate(expression: ast.expr, lengths: Mapping[str, int]) -> int:
    """Compute the length of an axis that is written in terms of others: `past + sequence`."""
    if isinstance(expression, ast.Name):
        return lengths[expression.id]
    if isinstance(expression, ast.Constant) and isinstance(expression.value, int):
        return expression.value
    if isinstance(expression, ast.BinOp) and type(expression.op) in _OPERATIONS:
        left = _evaluate(expression.left, lengths)
        right = _evaluate(expression.right, lengths)
        return _OPERATIONS[type(expression.op)](left, right)
    message = "more than sums and products"
    raise ValueError(message)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _tensors(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if _is_tensor(value)]


def _arrays(values: Sequence[Any]) -> list[Array]:
    """Return tensors as arrays; what is no tensor is part of the graph, and left out."""
    return [_array(value) for value in _tensors(values)]


def _array(tensor: "torch.Tensor") -> Array:
    import torch

    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    # NumPy has no bfloat16, and the graph that is compared has float32 in its place.
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
