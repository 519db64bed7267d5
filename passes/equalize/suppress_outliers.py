"""Cuts off the few weights that are much larger than the others of their output channel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.damage import decibels
from qcompiler.calibration.linear_examples import ExampleCollector, Examples, weight_matrix
from qcompiler.calibration.product_error import noise_ratio, some_outputs
from qcompiler.ir.channels.weights import data_input
from qcompiler.ir.dataflow import node_name
from qcompiler.ir.provenance import SUPPRESSED, annotate, scheme_of
from qcompiler.ir.quantizable import Site, find_sites, planned_spec
from qcompiler.ir.weights import read_all
from qcompiler.quant.arithmetic import dequantize
from qcompiler.quant.outlier_detection import row_limits
from qcompiler.quant.ranges import RangeMethod, quantize_tensor
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

Array = npt.NDArray[Any]

RULE: Final = "suppress-outliers"
_EXAMPLES: Final = 256
"""Rows of data that each op is tried on."""
_LEAST_GAIN: Final = 0.98
"""What the error of an op's output must fall to for its weight to be cut."""


@dataclass(frozen=True, slots=True)
class SuppressOptions:
    """Options of `suppress-outliers`.

    Attributes:
        samples: The calls to run the model on.
        weight_range: How `insert-qdq` will choose ranges: cutting must gain something beside it.
        memory_budget: Bytes the process may take.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    samples: Samples
    weight_range: RangeMethod = RangeMethod.WEIGHTED_MSE
    memory_budget: int = 2 << 30
    custom_op_libraries: tuple[Path, ...] = ()


class SuppressOutliers(Pass):
    """Cut weights at the largest that is no outlier of its output channel.

    Before: y = MatMul(x, w)
    After:  y = MatMul(x, clip(w, -t, t))    # t: one number per output channel
    Refuses: weights without outliers; those that something else reads, too; ops in bodies of
        others; and weights whose op's output, with the weight rounded as it will be, does not
        come nearer to that of the float weight on samples.

    What is an outlier is found coarsely, then finely (`quant.outlier_detection`; Ding et al. 2023,
    CBQ, arXiv 2312.07950). Outliers of data are what `equalize-channels` takes care of, which
    runs before.

    Raises (from `run`):
        UsageError: The examples of one op do not fit the memory budget.
        TargetError: ONNX Runtime cannot run the model on a sample.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    options: SuppressOptions

    def __init__(self, options: SuppressOptions) -> None:
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Find outliers, look at what cutting them does to the ops' outputs, and cut."""
        wanted: list[Site] = []
        skips: list[Skip] = []
        for site in find_sites(model)[0]:
            if scheme_of(site.node) is None or SUPPRESSED in site.node.metadata_props:
                continue
            if reason := _why_not(site, model):
                skips.append(Skip(RULE, node_name(site.node), reason))
            else:
                wanted.append(site)
        outcomes = list(self._suppress(model, wanted, context)) if wanted else []
        rewrites = [each for each in outcomes if isinstance(each, Rewrite)]
        skips += [each for each in outcomes if isinstance(each, Skip)]
        return PassResult(tuple(rewrites), tuple(skips))

    def _suppress(
        self, model: ir.Model, sites: Sequence[Site], context: PassContext
    ) -> Iterator[Rewrite | Skip]:
        options = self.options
        collector = ExampleCollector(
            model,
            options.samples,
            count=_EXAMPLES,
            memory_budget=options.memory_budget,
            custom_op_libraries=options.custom_op_libraries,
            threads=context.workers,
        )
        units = [[site] for site in sites]
        for found in collector.each(units, context.progress, "suppressing outliers"):
            for site, examples in found.items():
                yield self._cut(site, examples, context)

    def _cut(self, site: Site, examples: Examples, context: PassContext) -> Rewrite | Skip:
        """Cut a weight where that helps, and write down what was decided."""
        name = node_name(site.node)
        weight = read_all(site.tensor)
        cut, count = _cut_off(site, weight)
        if not count:
            annotate(site.node, suppressed="no, its weight has no outliers")
            return Skip(RULE, name, "its weight has no outliers")
        rows = examples.rows
        if not rows.shape[1]:
            return Skip(RULE, name, "no sample gives its data an element")
        before, after = (self._noise(site, weight, each, rows) for each in (weight, cut))
        facts = f"{count} of {weight.size} weights, from {decibels(before):.1f} dB to"
        facts += f" {decibels(after):.1f} dB"
        if after > _LEAST_GAIN * before:
            annotate(site.node, suppressed=f"no, {facts}")
            return Skip(RULE, name, f"cutting does not bring its output nearer: {facts}")
        annotate(site.node, suppressed=facts)
        value = site.weight
        value.const_value = context.store.put(value.name or "", cut, site.tensor.dtype)
        return Rewrite(RULE, name, facts)

    def _noise(self, site: Site, exact: Array, weight: Array, rows: Array) -> float:
        """Return the error of an op's output with a weight rounded, over that output's energy."""
        spec = planned_spec(site)
        assert spec is not None
        chosen, truth = some_outputs(site, weight), some_outputs(site, exact)
        found = quantize_tensor(chosen, spec, self.options.weight_range, chosen.dtype)
        restored = dequantize(found.codes, found.scale, found.zero_point, spec.granularity)
        made, should = (
            rows @ weight_matrix(site, np.asarray(each, np.float32)) for each in (restored, truth)
        )
        return noise_ratio(made - should, should)


def _cut_off(site: Site, weight: Array) -> tuple[Array, int]:
    """Return a weight without its outliers, of its type, and how many there were."""
    axis = site.axes.output
    assert axis is not None
    wide = np.moveaxis(weight, axis, 0)
    limits = row_limits(wide.reshape(len(wide), -1))
    shape = [1] * weight.ndim
    shape[axis] = -1
    limit = limits.reshape(shape)
    count = int((np.abs(weight.astype(np.float64)) > limit).sum())
    cut = np.clip(weight.astype(np.float64), -limit, limit).astype(weight.dtype)
    return cut, count


def _why_not(site: Site, model: ir.Model) -> str:
    """Return why a weight is left as it is, as a sentence; "" if it need not be."""
    if site.node.graph is not model.graph:
        return "it lies in the body of another node, where its data cannot be seen"
    if data_input(site) is None or site.axes.output is None:
        return "it multiplies its weight by nothing that samples show"
    if len(site.weight.uses()) > 1 or site.weight.is_graph_output():
        return f"its weight {site.weight.name} is read by others, too"
    return ""
