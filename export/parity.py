"""Whether a graph computes what its module computes."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from qcompiler.errors import ParityError, UsageError
from qcompiler.execution.outputs import OutputDifference, compare_outputs
from qcompiler.execution.sessions import Session, runtime_failure, session_options
from qcompiler.export.from_torch import require_torch
from qcompiler.export.random_calls import Calls
from qcompiler.ir.save import save_model
from qcompiler.ir.widened import widened
from qcompiler.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

TOLERANCES: Final[Mapping[ir.DataType, float]] = {
    ir.DataType.DOUBLE: 1e-9,
    ir.DataType.FLOAT: 1e-4,
    ir.DataType.FLOAT16: 2e-2,
    ir.DataType.BFLOAT16: 1e-1,
}
"""Largest difference, in parts of an output's peak, by the coarsest float type in a graph.

About a thousand roundings of float32, and twenty of the half types: deep networks round that
often, and an error of export is far larger.
"""


def check_parity(
    module: "torch.nn.Module | Callable[..., Any]",
    model: ir.Model,
    inputs: Sequence[Any],
    *,
    file: Path | None = None,
    tolerance: float | None = None,
    random_calls: int = 2,
    vary_lengths: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[OutputDifference, ...]:
    """Run a module and its graph on the same inputs and compare all outputs.

    The graph runs in ONNX Runtime with graph optimization off. A bfloat16 graph runs with float32
    in the place of bfloat16, for which its CPU kernels are missing; the module runs as it is.

    Besides the given calls, each is run `random_calls` times with other values: floats of the
    given mean and spread, integers and booleans between the smallest and the largest given.
    Dynamic axes then have other lengths in their ranges, where the module takes them.

    Args:
        module: The module, on any device; run in inference mode.
        model: Its graph, with the metadata that `from_torch` wrote.
        inputs: Calls: sequences of positional arguments, or mappings of keyword arguments; the
            tensors in them are the graph's inputs, in order.
        file: Where the graph is saved, if it is; else it is written to a scratch folder.
        tolerance: Largest difference in parts of an output's peak; None takes `TOLERANCES`.
        random_calls: Further calls for each of the given ones.
        vary_lengths: Whether random calls have other lengths than the given ones.
        seed: Of the random values and lengths.
        progress: Shows the task "comparing with PyTorch", in calls.

    Returns:
        For each output the worst of all calls.

    Raises:
        ParityError: An output differs by more than the tolerance, or in shape or number.
        UsageError: There is no call to compare with.
    """
    require_torch()
    if not inputs:
        message = "there are no inputs to compare the graph with its module"
        raise UsageError(message, hint="give at least one call")
    limit = _tolerance_of(model) if tolerance is None else tolerance
    calls = Calls(model, module, random_calls, vary_lengths, seed)
    total = len(inputs) * (1 + random_calls)
    found: list[tuple[OutputDifference, ...]] = []
    with (
        tempfile.TemporaryDirectory(prefix="qcompiler-") as scratch,
        (progress or SilentProgress()).task("comparing with PyTorch", total) as advance,
        _session(model, file, Path(scratch)) as session,
    ):
        for call in inputs:
            for values, expected in calls.of(call):
                found.append(_compare(model, session, values, expected))
                advance(1)
    worst = tuple(_worst(column) for column in zip(*found, strict=True))
    _refuse_beyond(worst, limit)
    return worst


def _tolerance_of(model: ir.Model) -> float:
    types = {value.dtype for value in model.graph.initializers.values()}
    types |= {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    limits = [TOLERANCES[dtype] for dtype in types if dtype is not None and dtype in TOLERANCES]
    return max(limits, default=TOLERANCES[ir.DataType.FLOAT])


def _session(model: ir.Model, file: Path | None, scratch: Path) -> Session:
    wide = widened(model)
    if file is None or wide is not model:
        file = scratch / "model.onnx"
        # In a file of its own ONNX Runtime maps the weights instead of copying them.
        save_model(wide, file, progress=SilentProgress(), external_data=True)
    return _open(file)


def _open(file: Path) -> Session:
    """Load a model for few runs: memory counts more than speed, so that weights stay mapped."""
    options = session_options(optimize=False, threads=None)
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class but this one
        raise runtime_failure(error, "ONNX Runtime cannot load the exported model") from error
    return Session(session, ExitStack())


def _compare(
    model: ir.Model, session: Session, values: Sequence[Array], expected: Sequence[Array]
) -> tuple[OutputDifference, ...]:
    names = [value.name or "" for value in model.graph.inputs]
    outputs = [value.name or "" for value in model.graph.outputs]
    if len(values) != len(names) or len(expected) != len(outputs):
        message = (
            f"the module has {len(values)} inputs and {len(expected)} outputs, and the graph "
            f"{len(names)} and {len(outputs)}"
        )
        raise ParityError(message, hint="compare a graph with the module it was exported from")
    got = session.run(dict(zip(names, values, strict=True)))
    return compare_outputs(dict(zip(outputs, expected, strict=True)), got)


def _worst(differences: Sequence[OutputDifference]) -> OutputDifference:
    return OutputDifference(
        differences[0].name,
        max(difference.max_abs for difference in differences),
        max(difference.max_rel for difference in differences),
        min(difference.sqnr_db for difference in differences),
        max(difference.spoiled for difference in differences),
    )


def _refuse_beyond(worst: Sequence[OutputDifference], limit: float) -> None:
    for difference in worst:
        if not difference.max_rel <= limit:
            message = (
                f"differs from PyTorch by {difference.max_rel:.2g} of its peak "
                f"({difference.max_abs:.2g}, SQNR {difference.sqnr_db:.1f} dB); allowed: {limit:g}"
            )
            hint = (
                "check that the module is deterministic, that its code does not depend on values "
                "or sizes of the example, and that no two example inputs are the same tensor"
            )
            raise ParityError(message, where=difference.name, hint=hint)
