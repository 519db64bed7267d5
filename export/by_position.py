"""A module called with the tensors among its arguments, in the order of its graph's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree


class ByPosition(torch.nn.Module):
    """Calls a module with arguments of the structure of an example.

    What is no tensor in the example is part of the graph, and stays as it is.

    Args:
        module: The module.
        positional: Positional arguments of the example.
        keywords: Its keyword arguments.
    """

    def __init__(
        self, module: torch.nn.Module, positional: Sequence[Any], keywords: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.module = module
        self._leaves, self._spec = pytree.tree_flatten((tuple(positional), dict(keywords)))

    @property
    def example(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the example."""
        return tuple(leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors of the module's result."""
        remaining = iter(tensors)
        leaves = [
            next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves
        ]
        positional, keywords = pytree.tree_unflatten(leaves, self._spec)
        result = pytree.tree_leaves(self.module(*positional, **keywords))
        return tuple(leaf for leaf in result if isinstance(leaf, torch.Tensor))
