"""Losses of tasks, on the outputs of a model in PyTorch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.calibration.task_calls import IGNORED, Task, TaskCall, TaskKind
from qcompiler.errors import QCompilerError, UsageError
from qcompiler.execution.differences import SMALLEST_PROBABILITY, Meaning, meaning_of
from qcompiler.ir.quantizable import FLOAT_TYPES

Outputs = Mapping[str, Tensor]
TaskLoss = Callable[[Outputs, TaskCall, Outputs], Tensor]
"""Returns a scalar from outputs, a sample, and what the float model returned for it."""

_SMALLEST_SIGNAL: Final = 1e-12


def loss_of(task: Task, model: ir.Model) -> TaskLoss:
    """Return the loss of a task.

    Raises:
        UsageError: It needs an output with logits, and it is not clear which that is.
    """
    if task.kind is TaskKind.OUTPUTS:
        return _OutputLoss({v.name or "": meaning_of(v) for v in _float_outputs(model)})
    if task.kind is TaskKind.LABELS:
        output, meaning = _logits(model)
        return _LabelLoss(output.name or "", meaning)
    assert task.function is not None
    return _UserLoss(task.origin, task.function)


@dataclass(frozen=True, slots=True)
class _OutputLoss:
    """Divergence from the float model's distributions; elsewhere relative squared error."""

    meanings: Mapping[str, Meaning | None]

    def __call__(self, outputs: Outputs, call: TaskCall, truth: Outputs) -> Tensor:
        parts = [
            _distance(outputs[name], truth[name], meaning)
            for name, meaning in self.meanings.items()
        ]
        return torch.stack(parts).sum()


@dataclass(frozen=True, slots=True)
class _LabelLoss:
    """Mean cross entropy over the positions that count."""

    output: str
    meaning: Meaning | None

    def __call__(self, outputs: Outputs, call: TaskCall, truth: Outputs) -> Tensor:
        wide = outputs[self.output].to(torch.float32)
        logits = _logarithm(wide, self.meaning or Meaning.LOGITS)
        assert call.labels is not None
        labels = torch.from_numpy(call.labels).to(logits.device)
        if logits.shape[:-1] != labels.shape:
            message = f"labels {list(labels.shape)} do not fit outputs {list(logits.shape)}"
            raise UsageError(message, where=f"output {self.output}")
        flat = logits.reshape(-1, logits.shape[-1])
        return functional.nll_loss(flat, labels.reshape(-1), ignore_index=IGNORED)


@dataclass(frozen=True, slots=True)
class _UserLoss:
    """What a user's function returns for outputs and inputs."""

    origin: str
    function: Callable[..., Any]

    def __call__(self, outputs: Outputs, call: TaskCall, truth: Outputs) -> Tensor:
        try:
            found = self.function(dict(outputs), dict(call.feeds))
        except QCompilerError:
            raise
        except Exception as error:  # whatever the user's code raises
            message = f"failed with {type(error).__name__}: {error}"
            hint = "--traceback shows where in the function"
            raise UsageError(message, where=f"--task {self.origin}", hint=hint) from error
        if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
            message = "returns no scalar tensor that depends on the outputs"
            raise UsageError(message, where=f"--task {self.origin}")
        return found.reshape(())


def _distance(found: Tensor, truth: Tensor, meaning: Meaning | None) -> Tensor:
    wide, right = found.to(torch.float32), truth.to(torch.float32)
    if meaning is None:
        return (wide - right).square().sum() / right.square().sum().clamp(min=_SMALLEST_SIGNAL)
    logs, wanted = _logarithm(wide, meaning), _logarithm(right, meaning)
    return (wanted.exp() * (wanted - logs)).sum(dim=-1).mean()


def _logarithm(values: Tensor, meaning: Meaning) -> Tensor:
    if meaning is Meaning.PROBABILITIES:
        return values.clamp(min=SMALLEST_PROBABILITY).log()
    return functional.log_softmax(values, dim=-1)


def _float_outputs(model: ir.Model) -> list[ir.Value]:
    found = [value for value in model.graph.outputs if value.dtype in FLOAT_TYPES]
    if not found:
        message = "no output of the model holds floats, so that no loss has a gradient"
        raise UsageError(message)
    return found


def _logits(model: ir.Model) -> tuple[ir.Value, Meaning | None]:
    """Return the output that holds scores of classes."""
    outputs = _float_outputs(model)
    known = [value for value in outputs if meaning_of(value) is not None]
    candidates = known or outputs
    if len(candidates) > 1:
        names = ", ".join(value.name or "" for value in candidates)
        message = f"it is not clear which output holds the scores of classes: {names}"
        raise UsageError(message, where="--task", hint="give a loss as MODULE:FUNCTION")
    return candidates[0], meaning_of(candidates[0])
