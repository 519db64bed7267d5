"""Whether a model is nearer to float with equalized channels, once all of it is quantized."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import onnx_ir as ir

from qcompiler.calibration.calls import Samples, counted
from qcompiler.calibration.quality import Reference
from qcompiler.ir.weights import WeightStore
from qcompiler.rewriting.base import Pass, PassContext

LEAST_GAIN_DB: Final = 0.25
"""What equalizing must gain at the outputs. Another rounding of the same weights moves them by as
much (CIFAR CNN and MiniLM, four roundings: up to 0.2 dB)."""
_SHARE_OF_OUTPUTS: Final = 4
"""One part in so many of the memory budget is for outputs of the float model."""


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """How outputs are checked.

    Attributes:
        quantize: Passes that make a Q/DQ graph of a planned model, as it is going to be: ranges,
            corrections, codes.
        samples: The calls to compare on.
        memory_budget: Bytes the process may take.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    quantize: tuple[Pass, ...]
    samples: Samples
    memory_budget: int = 2 << 30
    custom_op_libraries: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How near to float the outputs are.

    Attributes:
        before: SQNR in dB of the quantized model as it was.
        after: The same with equalized channels.
        calls: How many calls were compared.
    """

    before: float
    after: float
    calls: int

    @property
    def equalizes(self) -> bool:
        """Whether equalizing is worth it."""
        return self.after >= self.before + LEAST_GAIN_DB

    def __str__(self) -> str:
        found = f"{self.before:.2f} dB as they are, {self.after:.2f} dB with equalized channels"
        return f"{found} ({counted(self.calls, 'call')})"


def check_outputs(
    model: ir.Model, equalized: ir.Model, options: CheckOptions, context: PassContext
) -> Verdict:
    """Quantize copies of both forms of a model, and compare their outputs with the float model's.

    Args:
        model: The planned model as it was.
        equalized: The same with equalized channels.
        options: How.
        context: Where weights and progress go.

    Raises:
        TargetError: ONNX Runtime cannot run a model on a sample.
    """
    reference = Reference(
        model,
        options.samples,
        memory=options.memory_budget // _SHARE_OF_OUTPUTS,
        most_calls=len(options.samples),
        custom_op_libraries=options.custom_op_libraries,
    )

    def quality(planned: ir.Model) -> float:
        with _quantized(planned, options.quantize, context) as quantized:
            return reference.sqnr_db(quantized)

    return Verdict(quality(model), quality(equalized), len(reference))


@contextmanager
def _quantized(
    model: ir.Model, passes: tuple[Pass, ...], context: PassContext
) -> Iterator[ir.Model]:
    """Yield a quantized copy, whose weights go afterwards."""
    copy = model.clone()
    with WeightStore(context.store.directory) as store:
        for each in passes:
            each.run(copy, replace(context, store=store))
        yield copy
