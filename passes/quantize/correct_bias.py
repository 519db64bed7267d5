"""Takes the mean error that quantization makes out of the biases of linear ops."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final

import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.ir.dataflow import all_nodes, is_op, node_name
from qcompiler.ir.editing import value_names
from qcompiler.ir.linear_ops import LINEAR_OPS, LinearOp, NotFoldableError
from qcompiler.ir.provenance import BIAS_CORRECTED, OUTLIERS, TERMS, annotate, scheme_of
from qcompiler.ir.quantizable import row_of
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.quantize.bias_corrections import Correction, measure_corrections
from qcompiler.passes.quantize.bias_twins import MeasureOptions
from qcompiler.passes.quantize.bias_writing import write_bias
from qcompiler.quant.scheme import Activations
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage
from qcompiler.targets.capability import Target

RULE: Final = "correct-bias"


@dataclass(frozen=True, slots=True)
class CorrectBiasOptions:
    """Options of `correct-bias`.

    Attributes:
        samples: The calls; the last quarter judges corrections, the others make them.
        quantize: Turns a calibrated model into one with Q/DQ nodes, in this order.
        target: Which ops may get a bias that had none.
        memory_budget: Bytes the process may take. A quarter of it is for values that wait until
            the correction of an op is known; what does not fit goes to files.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    samples: Samples
    quantize: tuple[Pass, ...]
    target: Target
    memory_budget: int = 2 << 30
    custom_op_libraries: tuple[Path, ...] = ()


class CorrectBias(Pass):
    """Subtract from biases what quantization adds to the mean of each output channel.

    Before: y = Gemm(x, w, b)
    After:  y = Gemm(x, w, b - e)     # e = E[y of the quantized model] - E[y], by channel
    Refuses: ops without a bias whose kernel would not add one; biases that are computed or not
        one number per channel; weights that several ops share; ops in If, Loop and Scan bodies;
        corrections that make the error on held-out calls larger.

    The errors are those of a copy that is quantized as the model is going to be. Its ops are
    corrected in topological order, level by level (`bias_levels`), so that the error of an op is
    the one that is left when everything before it is quantized and corrected (Nagel et al. 2019,
    section 4.2, with means over samples in place of batch norm statistics). Padding does not
    count. The last quarter of the calls judges each correction (`bias_corrections`).

    Raises (from `run`):
        TargetError: ONNX Runtime cannot run the model on a sample.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    options: CorrectBiasOptions

    def __init__(self, options: CorrectBiasOptions) -> None:
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Measure a quantized copy, then write the corrections that help."""
        ops, skips = self._ops(model)
        if not ops or not len(self.options.samples):
            return PassResult((), tuple(skips))
        corrections = self._measure(model, ops, context)
        rewrites: list[Rewrite] = []
        taken = value_names(model) | {node.name or "" for node in all_nodes(model)}
        for op, correction in zip(ops, corrections, strict=True):
            name = node_name(op.node)
            if isinstance(correction, str):
                skips.append(Skip(RULE, name, correction))
                continue
            annotate(op.node, bias_corrected=correction.decibels)
            if not correction.objection:
                write_bias(op, correction.bias, context.store, self.name, taken)
                rewrites.append(Rewrite(RULE, name, _account(correction)))
            elif correction.shift.any():
                skips.append(Skip(RULE, name, correction.objection))
        return PassResult(tuple(rewrites), tuple(skips))

    def _ops(self, model: ir.Model) -> tuple[list[LinearOp], list[Skip]]:
        """Return the quantized ops whose bias can be corrected, and why that of others cannot."""
        ops: list[LinearOp] = []
        skips: list[Skip] = []
        for node in all_nodes(model):
            # A lookup adds nothing to what it finds.
            if scheme_of(node) is None or is_op(node, "Gather"):
                continue
            if BIAS_CORRECTED in node.metadata_props:
                continue
            try:
                ops.append(_correctable(node, model.graph, self.options.target))
            except NotFoldableError as error:
                skips.append(Skip(RULE, node_name(node), str(error)))
        return ops, skips

    def _measure(
        self, model: ir.Model, ops: list[LinearOp], context: PassContext
    ) -> list[Correction | str]:
        options = self.options
        with WeightStore(context.store.directory) as store:
            quantized = model.clone()
            for rewrite in options.quantize:
                rewrite.run(quantized, replace(context, store=store))
            measure = MeasureOptions(
                options.samples,
                context.store.directory,
                options.memory_budget,
                context.workers,
                options.custom_op_libraries,
            )
            return measure_corrections(model, quantized, ops, measure, context.progress)
        raise AssertionError  # a WeightStore swallows nothing


def _correctable(node: ir.Node, main: ir.Graph, target: Target) -> LinearOp:
    """Take an op apart whose bias can be corrected.

    Raises:
        NotFoldableError: It cannot be.
    """
    if node.graph is not main:
        message = "what it computes in an If, Loop or Scan body cannot be measured"
        raise NotFoldableError(message)
    if not is_op(node, *LINEAR_OPS):
        row = row_of(node)
        message = f"a {node.op_type} adds no bias"
        if row is not None and row.bias is not None:
            message = "what its biases are added to is not in the graph, and cannot be measured"
        raise NotFoldableError(message)
    op = LinearOp.of(node)
    if op.bias is None and is_op(node, "MatMul"):
        _require_added_bias(node, target)
    return op


def _require_added_bias(node: ir.Node, target: Target) -> None:
    """Check that a bias behind a MatMul that has none would cost nothing.

    Raises:
        NotFoldableError: It would.
    """
    scheme = scheme_of(node)
    assert scheme is not None
    row = next((r for r in target.added_biases if r.activations is scheme.activations), None)
    if row is None:
        message = f"it has no bias, and {target.title} would not add one in its kernel"
        raise NotFoldableError(message)
    shape, data = node.outputs[0].shape, node.inputs[0]
    known = shape is not None and (len(shape) == 2 or all(isinstance(n, int) for n in shape))
    if not row.any_shape and not known:
        message = (
            f"it has no bias, and {target.title} adds one in its kernel only to matrices and "
            "results of fixed shape"
        )
        raise NotFoldableError(message)
    static = scheme.activations is Activations.STATIC
    if static and data is not None and {OUTLIERS, TERMS} & data.metadata_props.keys():
        message = (
            "it has no bias, and what outlier channels or a second term of codes contribute comes "
            "between its kernel and an Add"
        )
        raise NotFoldableError(message)


def _account(correction: Correction) -> str:
    return (
        f"held-out SQNR of its result {correction.decibels} dB, root mean square of the mean "
        f"errors {correction.bias_before:.3g} -> {correction.bias_after:.3g}"
    )
