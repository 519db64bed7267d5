"""Writing a transformers model as ONNX with PyTorch's exporter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

# Holds the paths of the machine that exported; `namespace` repeats `name_scopes`.
_DROPPED_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node", "namespace")
_EXTERNAL_FROM_BYTES = 1 << 10


class _OneOutput(torch.nn.Module):
    """The model with positional inputs and one output, as a graph has them."""

    def __init__(
        self, model: PreTrainedModel, inputs: Sequence[str], output: str, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)
        self.output = output
        self.options = options

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        result = self.model(**dict(zip(self.inputs, values, strict=True)), **self.options)
        tensor: torch.Tensor = result[self.output]
        return tensor


def export(
    model: PreTrainedModel,
    path: Path,
    *,
    inputs: Sequence[str],
    output: str,
    max_sequence: int,
    external_data: bool = False,
    **options: Any,
) -> None:
    """Write `model` to `path`, with a dynamic batch and sequence.

    Args:
        model: In any mode; it is exported for inference.
        path: The `.onnx` file.
        inputs: Names of the int64 [batch, sequence] inputs, in the order the graph gets them.
        output: Name of the one field of the model's result that becomes the output.
        max_sequence: Longest sequence the model takes.
        external_data: Whether weights go to one file beside `path`.
        options: Further arguments of the model's forward, constants of the graph.
    """
    ids = torch.arange(14).reshape(2, 7) + 10
    examples = tuple(torch.ones_like(ids) if "mask" in name else ids % 2 for name in inputs)
    batch = torch.export.Dim("batch", min=1, max=1024)
    sequence = torch.export.Dim("sequence", min=2, max=max_sequence)
    program = torch.onnx.export(
        _OneOutput(model, inputs, output, options).eval(),
        examples,
        dynamo=True,
        input_names=list(inputs),
        output_names=[output],
        # One element, for the one variadic parameter of forward.
        dynamic_shapes=(({0: batch, 1: sequence},) * len(inputs),),
        verbose=False,
    )
    if program is None:
        message = "torch.onnx.export returned no program"
        raise RuntimeError(message)
    exported = program.model
    _drop_metadata(exported)
    data = f"{path.name}.data" if external_data else None
    ir.save(exported, path, external_data=data, size_threshold_bytes=_EXTERNAL_FROM_BYTES)


def _drop_metadata(model: ir.Model) -> None:
    """Remove what says on which machine, or how, the model was exported."""
    nodes = list(model.graph.all_nodes())
    values = [value for node in nodes for value in node.outputs]
    holders: list[ir.Model | ir.Graph | ir.Node | ir.Value] = [model, model.graph, *nodes, *values]
    for holder in holders:
        for key in _DROPPED_METADATA:
            holder.metadata_props.pop(key, None)
