"""A transformers model seen as a graph: inputs by position, chosen outputs, unchanged names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


class Facade(torch.nn.Module):
    """Calls a model with positional inputs, and returns some fields of its result.

    It takes on the model's submodules, parameters and buffers instead of holding the model as a
    submodule of its own, so that every name in the graph is the checkpoint's.

    Args:
        model: The model; it is put into inference mode.
        inputs: Parameters of the model's forward that the graph's inputs are, in order.
        outputs: Fields of the model's result that become the graph's outputs.
        options: Further arguments of the model's forward: constants of the graph.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Sequence[str],
        outputs: Sequence[str],
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        # In a tuple it is no submodule, so it adds nothing to the names.
        self._model = (model,)
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._options = dict(options)
        for module in (model, self):
            torch.nn.Module.train(module, False)
        # Tracing is faster without.
        self.requires_grad_(False)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs for inputs in the order of the graph's."""
        result = self.call(dict(zip(self._inputs, values, strict=True)))
        return tuple(result[name] for name in self._outputs)

    def call(self, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the model's own result for arguments by name."""
        # Not through __call__, which would put the model's class between the root and its parts.
        result: Mapping[str, Any] = self._model[0].forward(**keywords, **self._options)
        return result
