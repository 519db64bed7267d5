"""Parts of a product that are computed beside it and added to it.

    y = MatMul(x, w with some rows zero) + MatMul(Gather(x, rows), w[rows])

The sum is what the product was, and the two parts can be stored differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.channels.weights import MATRIX_OPS
from qcompiler.ir.dataflow import int_attribute, node_name
from qcompiler.ir.editing import add_initializer, drop_unused_initializers, fresh_name, value_names
from qcompiler.ir.provenance import CREATED_BY
from qcompiler.ir.quantizable import Site
from qcompiler.ir.substitution import add_to_result, new_node
from qcompiler.ir.weights import WeightStore, read_all

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class SidePath:
    """What was put beside a product.

    Attributes:
        node: The node that computes the part.
        values: Initializer of its weights.
        index: Initializers that say where in the weight they were.
    """

    node: ir.Node
    values: ir.Value
    index: tuple[ir.Value, ...]


class SidePathBuilder:
    """Takes parts of products of one model out into side paths; what two share is made once."""

    def __init__(
        self,
        model: ir.Model,
        store: WeightStore,
        created_by: str,
        *,
        main: str,
        side: str,
        shared: bool = True,
    ) -> None:
        """Prepare for a model.

        Args:
            model: The model.
            store: Where large tensors go.
            created_by: Name of the pass.
            main: What names call the part that stays, such as "inliers".
            side: What they call the part that is taken out.
            shared: Whether one Gather serves all side paths of a value with equal channels.
        """
        self._store = store
        self._created_by = created_by
        self._main = main
        self._side = side
        self._shared = shared
        self._taken = value_names(model)
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def split_channels(
        self, site: Site, channels: npt.NDArray[np.int64], stored: ir.DataType | None = None
    ) -> SidePath:
        """Let input channels of a product be multiplied by a weight of their own.

        Args:
            site: A MatMul, Gemm or ungrouped Conv with the data on the left, whose weight nobody
                else reads.
            channels: Ascending numbers of input channels.
            stored: Type that the weight of the side path is stored in, in front of a Cast; None
                is the weight's own, without one.

        Returns:
            The side path. Its weight is `[channels, N]` for a matrix, and of the Conv's own layout.
        """
        node, axis = site.node, site.axes.reduction
        data = node.inputs[site.row.data or 0]
        assert data is not None
        columns = self._columns(data, channels, node)
        values = np.array(read_all(site.tensor))
        part = np.take(values, channels, axis=axis)
        np.moveaxis(values, axis, 0)[channels] = 0
        matrix = site.row.op_type in MATRIX_OPS
        if matrix:
            # [channels, N], however the weight is stored, and times what a Gemm multiplies by.
            part = np.ascontiguousarray(part if axis == 0 else part.T)
            part = part * np.asarray(alpha_of(site), part.dtype)
        side = self._store_side(site, part, stored)
        self._replace_main(site, values)
        product = self._node(
            "MatMul" if matrix else "Conv",
            [columns, self._cast(side, site.tensor.dtype, node)],
            f"{_stem(node)}.of_{self._side}",
            node.outputs[0].dtype,
        )
        if not matrix:
            product.attributes.update(node.attributes)
        name = fresh_name(f"{_stem(node)}.of_{self._main}", self._taken)
        add_to_result(node, product, name)
        return SidePath(product, side, (columns.producer().inputs[1],))  # type: ignore[union-attr,arg-type]

    def split_elements(
        self, site: Site, mask: npt.NDArray[np.bool_], stored: ir.DataType
    ) -> SidePath:
        """Let single elements of a matrix be multiplied on their own.

        What they multiply is gathered, and their products are added to the product's result by
        ScatterND. No dense copy of the weight arises (forms that ONNX Runtime makes one of:
        docs/islands.md).

        Args:
            site: A MatMul or Gemm with the data on the left, whose rank is known, and a weight
                that nobody else reads.
            mask: Bool, of the weight's shape: which elements.
            stored: Type that they are stored in, in front of a Cast.

        Returns:
            The side path. Its values lie by output channel, then input channel.
        """
        node = site.node
        values = np.array(read_all(site.tensor))
        outputs, inputs = np.nonzero(mask if site.axes.output == 0 else mask.T)
        turned = values if site.axes.output == 0 else values.T
        part = turned[outputs, inputs]
        values[mask] = 0
        data, result = node.inputs[site.row.data or 0], node.outputs[0]
        assert data is not None
        rank = len(data.shape or ())
        part = part.reshape(-1, *[1] * (rank - 1))
        side = self._store_side(site, part, stored)
        self._replace_main(site, values)
        index = [
            self._index(f"{side.name}.{label}", numbers, size, node)
            for label, numbers, size in (
                ("inputs", inputs, site.reduction),
                ("outputs", outputs[:, np.newaxis], site.outputs),
            )
        ]
        first = [rank - 1, *range(rank - 1)]
        # Sums are float32: ONNX Runtime adds in no narrower type here.
        stem, wide, own = f"{_stem(node)}.of_{self._side}", ir.DataType.FLOAT, result.dtype
        turned_data = self._turned(data, first, node)
        rows = self._cast(index[0], ir.DataType.INT32, node)
        taken = self._insert("Gather", [turned_data, rows], f"{stem}.data", own, node, axis=0)
        factors = [self._cast(taken, wide, node), self._cast(side, wide, node)]
        products = self._insert("Mul", factors, f"{stem}.products", wide, node)
        places = self._cast(index[1], ir.DataType.INT64, node)
        chain = [self._node("Transpose", [result], f"{stem}.turned", own, perm=first)]
        if own != wide:
            chain.append(self._behind(chain, "Cast", wide, to=int(wide)))
        added = [chain[-1].outputs[0], places, products]
        scatter = self._node("ScatterND", added, f"{stem}.added", wide, reduction="add")
        chain.append(scatter)
        if own is not None and own != wide:
            chain.append(self._behind(chain, "Cast", own, to=int(own)))
        chain.append(self._behind(chain, "Transpose", own, perm=[*range(1, rank), 0]))
        self._put_behind(node, chain)
        return SidePath(scatter, side, (index[0], index[1]))

    def _columns(
        self, data: ir.Value, channels: npt.NDArray[np.int64], before: ir.Node
    ) -> ir.Value:
        """Return some channels of a value."""
        key = (data, channels.tobytes(), self._shared or before)
        if key in self._made:
            return self._made[key]
        graph = before.graph
        assert isinstance(graph, ir.Graph)
        axis = 1 if before.op_type == "Conv" else -1
        name = fresh_name(f"{data.name}.{self._side}", self._taken)
        label = fresh_name(f"{name}.channels", self._taken)
        tensor = ir.tensor(channels.astype(np.int32), name=label)
        index = add_initializer(graph, label, tensor)
        node = new_node(
            self._created_by,
            "Gather",
            [data, index],
            name,
            attributes={"axis": axis},
            dtype=data.dtype,
        )
        graph.insert_before(before, node)
        assert data.shape is not None
        shape = [*data.shape]
        shape[axis] = len(channels)
        node.outputs[0].shape = ir.Shape(shape)
        self._made[key] = node.outputs[0]
        return node.outputs[0]

    def _turned(self, data: ir.Value, perm: Sequence[int], before: ir.Node) -> ir.Value:
        key = (data, "turned")
        if key not in self._made:
            name = f"{data.name}.turned"
            self._made[key] = self._insert("Transpose", [data], name, data.dtype, before, perm=perm)
        return self._made[key]

    def _index(self, name: str, numbers: Array, size: int, node: ir.Node) -> ir.Value:
        """Store positions in as few bytes as they need."""
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        name = fresh_name(name, self._taken)
        kind = index_type(size)
        tensor = self._store.put(name, numbers.astype(kind.numpy()), kind)
        return add_initializer(graph, name, tensor)

    def _store_side(self, site: Site, part: Array, stored: ir.DataType | None) -> ir.Value:
        home = site.weight.graph
        assert isinstance(home, ir.Graph)
        name = fresh_name(f"{site.weight.name or 'weight'}.{self._side}", self._taken)
        kind = stored or site.tensor.dtype
        return add_initializer(home, name, self._store.put(name, narrowed(part, kind), kind))

    def _replace_main(self, site: Site, values: Array) -> None:
        weight, home = site.weight, site.weight.graph
        assert isinstance(home, ir.Graph)
        name = f"{weight.name or 'weight'}.{self._main}"
        tensor = self._store.put(name, values, site.tensor.dtype)
        main = add_initializer(home, fresh_name(name, self._taken), tensor)
        main.metadata_props[CREATED_BY] = self._created_by
        for use in list(weight.uses()):
            use.node.replace_input_with(use.idx, main)
        drop_unused_initializers([weight])

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        if value.dtype == dtype:
            return value
        return self._insert("Cast", [value], f"{value.name}.cast", dtype, before, to=int(dtype))

    def _insert(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        dtype: ir.DataType | None,
        before: ir.Node,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        node = self._node(op_type, inputs, name, dtype, **attributes)
        graph = before.graph
        assert isinstance(graph, ir.Graph)
        graph.insert_before(before, node)
        return node.outputs[0]

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        dtype: ir.DataType | None,
        **attributes: int | str | Sequence[int],
    ) -> ir.Node:
        name = fresh_name(name, self._taken)
        return new_node(
            self._created_by, op_type, list(inputs), name, attributes=attributes, dtype=dtype
        )

    def _behind(
        self,
        chain: Sequence[ir.Node],
        op_type: str,
        dtype: ir.DataType | None,
        **attributes: int | Sequence[int],
    ) -> ir.Node:
        """Return a node that reads the last of a chain."""
        before = chain[-1].outputs[0]
        name = f"{before.name}.{op_type.lower()}"
        return self._node(op_type, [before], name, dtype, **attributes)

    def _put_behind(self, node: ir.Node, chain: Sequence[ir.Node]) -> None:
        """Insert nodes of which the last computes what everybody reads in place of the result."""
        graph, result, joined = node.graph, node.outputs[0], chain[-1].outputs[0]
        assert isinstance(graph, ir.Graph)
        stem = _stem(node)
        inside = {(use.node, use.idx) for use in result.uses() if use.node in chain}
        joined.shape = result.shape
        graph.insert_after(node, list(chain))
        result.replace_all_uses_with(joined, replace_graph_outputs=True)
        for reader, index in inside:
            reader.replace_input_with(index, result)
        joined.metadata_props.update(result.metadata_props)
        result.metadata_props.clear()
        result.name = fresh_name(f"{stem}.of_{self._main}", self._taken)
        joined.name = stem


def index_type(size: int) -> ir.DataType:
    """Return the type that positions below `size` are stored in."""
    return ir.DataType.UINT16 if size <= 1 << 16 else ir.DataType.INT32


def narrowed(values: Array, dtype: ir.DataType) -> Array:
    """Return floats in another type; what is too large for it becomes its largest number."""
    kind = dtype.numpy()
    if values.dtype == kind:
        return values
    limit = float(np.finfo(np.float16).max) if dtype == ir.DataType.FLOAT16 else np.inf
    return np.clip(values.astype(np.float32), -limit, limit).astype(kind)


def alpha_of(site: Site) -> float:
    """Return what a Gemm multiplies its product by; 1 for other ops."""
    alpha = site.node.attributes.get("alpha")
    return 1.0 if alpha is None else alpha.as_float()


def why_no_side_path(site: Site, *, single: bool = False) -> str | None:
    """Return why nothing can be taken out of a product, as a clause; None if it can.

    Args:
        site: The product.
        single: Whether single elements are to be taken, rather than input channels.
    """
    op = site.row.op_type
    if op not in ("MatMul", "Gemm", "FusedMatMul", "Conv"):
        return f"a {op} has no input channels that could be multiplied on their own"
    if len(site.weight.uses()) > 1:
        return f"its weight {site.weight.name} is shared"
    data = site.node.inputs[site.row.data or 0]
    if data is None or data.shape is None:
        return "the shape of its data is not known"
    if op == "Conv":
        return _why_not_conv(site, single=single)
    turned = any(int_attribute(site.node, name, 0) for name in ("transA", "transBatchA"))
    if site.left or turned or len(site.shape) != 2:
        return "its weight is no matrix on the right of its data"
    return None if alpha_of(site) == 1.0 else "it multiplies the product by alpha"


def _why_not_conv(site: Site, *, single: bool) -> str | None:
    if single:
        return "single weights of a Conv have no form that runs faster than the whole Conv"
    if int_attribute(site.node, "group", 1) != 1:
        return "its channels lie in groups"
    return "its weight is transposed in the graph" if site.transposes else None


def _stem(node: ir.Node) -> str:
    return node.outputs[0].name or node_name(node)
