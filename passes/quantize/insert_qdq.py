"""Stores weights as integer codes behind DequantizeLinear nodes."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.ir.dataflow import all_nodes, node_label
from qcompiler.ir.editing import add_initializer, fresh_name, value_names
from qcompiler.ir.provenance import (
    BYTES_AFTER,
    QUANTIZED_INPUTS,
    SCHEME,
    SQNR,
    annotate,
    scheme_of,
)
from qcompiler.ir.quantizable import Site, find_sites, planned_spec
from qcompiler.ir.weights import WeightStore, read_slice
from qcompiler.passes.quantize.bias_scales import least_shared_scales
from qcompiler.quant.granularity import PerBlock, PerTensor
from qcompiler.quant.ranges import (
    QuantizedTensor,
    RangeMethod,
    quantize_slice,
    quantize_tensor,
    sqnr_db,
)
from qcompiler.quant.scheme import QSpec
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage

SLICE_BYTES = 24 << 20
"""Bytes of float weight a worker holds at once, where slices are rows."""
COLUMN_SLICE_BYTES = 64 << 20
"""The same where slices are columns: they lie scattered in the file, and fewer are read faster."""
_PARTS = ("codes", "scale", "zero_point", "dequantized")
"""What the values that stand for a weight are called, after its name."""


@dataclass(frozen=True, slots=True)
class InsertQdqOptions:
    """Options of `insert-qdq`.

    Attributes:
        weight_range: How the clipping range of each scale group is chosen.
    """

    weight_range: RangeMethod = RangeMethod.WEIGHTED_MSE


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight as the graph will hold it, and what the rounding cost.

    Attributes:
        codes: Integer codes, the shape of the weight.
        scale: Scales, of the weight's float type, of shape `scale_shape(shape, granularity)`.
        zero_point: Zero points of the codes' type and the scale's shape, None when symmetric.
        squared_error: Sum of squared differences between weight and dequantized weight.
        squared_signal: Sum of squared weights.
    """

    codes: ir.TensorProtocol
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None
    squared_error: float
    squared_signal: float

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points, 4- and 2-bit codes packed."""
        zero_point = 0 if self.zero_point is None else self.zero_point.nbytes
        return self.codes.nbytes + self.scale.nbytes + zero_point


class InsertQdq(Pass):
    """Replace every weight that has a scheme by codes and a DequantizeLinear.

    Before: y = MatMul(x, w)                                  w: float [K, N]
    After:  y = MatMul(x, DequantizeLinear(codes, scale))     codes: int4 [K, N], scale [K/B, N]
    Refuses: nothing: what cannot be quantized was given the scheme "float" by assign-schemes.

    Tied sites share one set of codes. Names that are taken get a number: `w_2.codes`. Weights
    stream: each of `workers` threads holds one slice, of about 24 MiB where it is cut along
    the first axis and 64 MiB along another, and large codes go to the context's store.

    Raises (from `run`):
        ModelError: A weight holds NaN or infinity; the message names it.
    """

    name: ClassVar[str] = "insert-qdq"
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    options: InsertQdqOptions

    def __init__(self, options: InsertQdqOptions | None = None) -> None:
        self.options = options or InsertQdqOptions()

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Quantize every planned weight, then rewire its readers."""
        groups = _planned(find_sites(model)[0])
        position = {node: index for index, node in enumerate(all_nodes(model))}
        taken = value_names(model) | {node.name or "" for node in position}
        stems = [_free_stem(sites[0].weight.name or "weight", taken) for sites in groups]
        rewrites: list[Rewrite] = []
        total = sum(sites[0].tensor.nbytes for sites in groups)
        with (
            context.progress.task("quantizing weights", total) as advance,
            ThreadPoolExecutor(context.workers, "quantize") as pool,
        ):
            reader = _SliceReader()
            pending = [
                pool.submit(self._quantize, sites, stem, context.store, reader)
                for sites, stem in zip(groups, stems, strict=True)
            ]
            try:
                for sites, stem, future in zip(groups, stems, pending, strict=True):
                    nbytes = sites[0].tensor.nbytes
                    weight = future.result()
                    _rewire(sites, weight, position, stem, taken)
                    rewrites.extend(_record(sites, weight))
                    advance(nbytes)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return PassResult(tuple(rewrites))

    def _quantize(
        self, sites: Sequence[Site], stem: str, store: WeightStore, reader: "_SliceReader"
    ) -> QuantizedWeight:
        site = sites[0]
        try:
            return _quantize_in_slices(sites, stem, self.options.weight_range, store, reader)
        except ValueError as error:
            message = f"its weight {site.weight.name} cannot be quantized: {error}"
            raise ModelError(
                message,
                where=node_label(site.node),
                hint="repair the export, or leave the node in float with --exclude",
                reason="weight-not-quantizable",
            ) from error


class _SliceReader:
    """Reads slices of weights, each thread into a buffer of its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    def read(self, tensor: ir.TensorProtocol, axis: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Read as `read_slice` does; the result is good until the thread reads again."""
        if not hasattr(self._local, "buffer"):
            # Slices are rounded to whole blocks; one that does not fit gets memory of its own.
            self._local.buffer = np.empty(2 * SLICE_BYTES, dtype=np.uint8)
        return read_slice(tensor, axis, start, stop, self._local.buffer)


def _planned(sites: Sequence[Site]) -> list[list[Site]]:
    """Group the sites that have a scheme by the weight they share, in graph order."""
    groups: dict[ir.Value, list[Site]] = {}
    for site in sites:
        if scheme_of(site.node) is not None:
            groups.setdefault(site.weight, []).append(site)
    return list(groups.values())


def _free_stem(wanted: str, taken: set[str]) -> str:
    """Return what the names of a weight's parts begin with, and take these names."""
    stem, number = wanted, 1
    while not taken.isdisjoint(f"{stem}.{part}" for part in _PARTS):
        number += 1
        stem = f"{wanted}_{number}"
    taken.update(f"{stem}.{part}" for part in _PARTS)
    return stem


def _spec(site: Site) -> QSpec:
    spec = planned_spec(site)
    assert spec is not None
    return spec


def _quantize_in_slices(
    sites: Sequence[Site],
    name: str,
    method: RangeMethod,
    store: WeightStore,
    reader: "_SliceReader",
) -> QuantizedWeight:
    """Quantize the weight that sites share; they have one scheme."""
    site = sites[0]
    tensor, spec = site.tensor, _spec(site)
    axis, slices = _plan_slices(site, spec)
    scale_dtype = np.dtype(tensor.dtype.numpy())
    code_type = ir.DataType[spec.qtype.onnx_name]
    # ONNX Runtime makes a QGemm only where the weight says that its zero point is 0.
    stated = QUANTIZED_INPUTS in site.node.metadata_props
    least = _least_scale(sites, spec)
    if len(slices) == 1:
        values = reader.read(tensor, 0, 0, site.shape[0])
        whole = quantize_tensor(values, spec, method, scale_dtype, least)
        codes = store.put(f"{name}.codes", whole.codes, code_type)
        return _weight(name, codes, [whole], axis, code_type, store, state_zeros=stated)
    writer = store.open_tensor(f"{name}.codes", code_type, site.shape)
    parts: list[QuantizedTensor] = []
    shared: npt.NDArray[Any] | None = None
    if isinstance(spec.granularity, PerTensor):
        every = (reader.read(tensor, axis, *bounds) for bounds in slices)
        shared = _shared_scale(every, spec, scale_dtype, least)
    for start, stop in slices:
        values = reader.read(tensor, axis, start, stop)
        if shared is not None:
            part = quantize_slice(values, spec, shared)
        else:
            floor = None if least is None else least[start:stop]
            part = quantize_tensor(values, spec, method, scale_dtype, floor)
        writer.write_slice(axis, start, part.codes)
        parts.append(_without_codes(part))
    return _weight(name, writer.finish(), parts, axis, code_type, store, state_zeros=stated)


def _shared_scale(
    slices: Iterable[npt.NDArray[Any]],
    spec: QSpec,
    dtype: np.dtype[Any],
    least: npt.NDArray[np.float32] | None,
) -> npt.NDArray[Any]:
    """Return the scale of a whole tensor, which covers the range of all its slices.

    At 8 bits clipping gains next to nothing.
    """
    scale = np.ones((), dtype)
    found = False
    for values in slices:
        part = quantize_tensor(values, spec, RangeMethod.MIN_MAX, dtype, least)
        # A slice of zeros has the scale 1, which says nothing about the others.
        if part.squared_signal and (not found or part.scale > scale):
            scale, found = part.scale, True
    return scale


def _least_scale(sites: Sequence[Site], spec: QSpec) -> npt.NDArray[np.float32] | None:
    """Return what the scales of a weight must not be below, in their shape; None for no limit."""
    if spec.pairs is None:
        return None
    least = least_shared_scales(sites)
    if least is None or not isinstance(spec.granularity, PerTensor):
        return least
    return np.asarray(least.max(), np.float32)


def _plan_slices(site: Site, spec: QSpec) -> tuple[int, list[tuple[int, int]]]:
    """Cut a weight so that no scale group and no byte of packed codes is cut.

    Returns:
        The axis to cut along, and (start, stop) pairs along it.
    """
    shape, granularity = site.shape, spec.granularity
    if isinstance(granularity, PerBlock):
        axis, unit = 0, granularity.block_size if granularity.axis == 0 else 1
    else:
        # Reduction rows stay whole also where all of them share a scale.
        axis, unit = site.axes.output or 0, 1
    pieces = -(-site.tensor.nbytes // (SLICE_BYTES if axis == 0 else COLUMN_SLICE_BYTES))
    if pieces == 1:
        return 0, [(0, shape[0])]
    unit = max(unit, 8)  # whole bytes of 2- and 4-bit codes, whichever axis is cut
    units = -(-shape[axis] // unit)
    step = max(1, units // pieces) * unit
    return axis, [(start, min(start + step, shape[axis])) for start in range(0, shape[axis], step)]


def _without_codes(part: QuantizedTensor) -> QuantizedTensor:
    """Drop the codes of a slice that has been written."""
    return QuantizedTensor(
        part.codes[:0], part.scale, part.zero_point, part.squared_error, part.squared_signal
    )


def _weight(
    name: str,
    codes: ir.TensorProtocol,
    parts: Sequence[QuantizedTensor],
    axis: int,
    code_type: ir.DataType,
    store: WeightStore,
    *,
    state_zeros: bool,
) -> QuantizedWeight:
    """Join the scales of slices cut along `axis` and keep them in the store.

    With `state_zeros` a symmetric weight gets zero points of 0, rather than none.
    """
    scale = _join([part.scale for part in parts], axis)
    points = [part.zero_point for part in parts if part.zero_point is not None]
    zero_point = None
    if points or state_zeros:
        joined = _join(points, axis) if points else np.zeros(scale.shape, parts[0].codes.dtype)
        zero_point = store.put(f"{name}.zero_point", joined, code_type)
    return QuantizedWeight(
        codes,
        store.put(f"{name}.scale", scale, ir.DataType.from_numpy(scale.dtype)),
        zero_point,
        sum(part.squared_error for part in parts),
        sum(part.squared_signal for part in parts),
    )


def _join(parts: Sequence[npt.NDArray[Any]], axis: int) -> npt.NDArray[Any]:
    if len(parts) == 1 or parts[0].ndim == 0:
        return parts[0]
    # A per-axis scale is a vector over the very axis the slices were cut along.
    return np.concatenate(parts, axis=0 if parts[0].ndim == 1 else axis)


def _rewire(
    sites: Sequence[Site],
    weight: QuantizedWeight,
    position: dict[ir.Node, int],
    stem: str,
    taken: set[str],
) -> None:
    """Put one DequantizeLinear into every graph that reads the weight, and drop the float."""
    source = sites[0].weight
    home = source.graph
    assert home is not None
    operands = [add_initializer(home, tensor.name or "", tensor) for tensor in _tensors(weight)]
    readers: dict[ir.Graph, list[ir.Node]] = {}
    for node in source.consumers():
        assert node.graph is not None
        readers.setdefault(node.graph, []).append(node)
    for index, (graph, nodes) in enumerate(readers.items()):
        name = f"{stem}.dequantized"
        name = fresh_name(f"{name}.{index}", taken) if index else name
        dequantize = _dequantize_node(sites[0], operands, name)
        first = min(nodes, key=lambda node: position[node])
        graph.insert_before(first, dequantize)
        for node in nodes:
            for use in [use for use in source.uses() if use.node is node]:
                node.replace_input_with(use.idx, dequantize.outputs[0])
    home.initializers.pop(source.name or "")


def _tensors(weight: QuantizedWeight) -> Iterator[ir.TensorProtocol]:
    yield weight.codes
    yield weight.scale
    if weight.zero_point is not None:
        yield weight.zero_point


def _dequantize_node(site: Site, operands: Sequence[ir.Value], name: str) -> ir.Node:
    granularity = _spec(site).granularity
    attributes = []
    if not isinstance(granularity, PerTensor):
        attributes.append(ir.AttrInt64("axis", granularity.axis))
    if isinstance(granularity, PerBlock):
        attributes.append(ir.AttrInt64("block_size", granularity.block_size))
    node = ir.Node("", "DequantizeLinear", operands, attributes, name=name, num_outputs=1)
    output = node.outputs[0]
    output.name = name
    output.type = ir.TensorType(site.tensor.dtype)
    output.shape = ir.Shape(site.shape)
    annotate(node, created_by=InsertQdq.name)
    return node


def _record(sites: Sequence[Site], weight: QuantizedWeight) -> Iterator[Rewrite]:
    """Write what the rounding cost on every site, and yield one rewrite for each."""
    quality = sqnr_db(weight.squared_signal, weight.squared_error)
    for site in sites:
        facts = site.node.metadata_props
        # An op with two weights (LSTM) reports the worse quality and the sum of the sizes.
        worst = min(quality, float(facts.get(SQNR, quality)))
        size = weight.nbytes + int(facts.get(BYTES_AFTER, 0))
        annotate(site.node, weight_sqnr_db=worst, weight_bytes_after=size)
        text = site.node.metadata_props[SCHEME]
        yield Rewrite("insert-qdq", site.label, f"{text}, {quality:.1f} dB")
