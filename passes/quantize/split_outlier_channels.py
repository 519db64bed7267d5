"""Takes the outlier channels of an activation out of the integer product."""

import json
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import node_name
from qcompiler.ir.editing import add_initializer, drop_unused_initializers, fresh_name, value_names
from qcompiler.ir.provenance import CREATED_BY, OUTLIERS, QUANTIZED_INPUTS, annotate
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.ir.substitution import add_to_result, new_node
from qcompiler.ir.weights import WeightStore, read_all
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "split-outlier-channels"


class SplitOutlierChannels(Pass):
    """Compute the part of a product that outlier channels contribute in float.

    Before: y = MatMul(x, w)                 # x: qcompiler.outlier_channels = "[99]"
    After:  y = MatMul(x, w with row 99 zero) + MatMul(Gather(x, [99], axis=-1), w[[99]])
    Refuses: weights that several ops share.

    With the rows zero, what the codes of these channels saturate to does not matter, and the range
    of the others decides the scale (LLM.int8(), Dettmers et al. 2022, section 3.2).
    """

    name: ClassVar[str] = "split-outlier-channels"
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.REORDERED
    tolerance: ClassVar[float | None] = 1e-4

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Split every product whose data input has outlier channels."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        taken = value_names(model)
        gathers: dict[ir.Value, ir.Value] = {}
        for site in find_sites(model)[0]:
            data = None if site.row.data is None else site.node.inputs[site.row.data]
            if data is None or OUTLIERS not in data.metadata_props:
                continue
            if QUANTIZED_INPUTS not in site.node.metadata_props or _is_split(site):
                continue
            name = node_name(site.node)
            if len(site.weight.uses()) > 1:
                skips.append(Skip(RULE, name, f"its weight {site.weight.name} is shared"))
                continue
            channels = np.array(json.loads(data.metadata_props[OUTLIERS]), np.int64)
            columns = gathers.get(data)
            if columns is None:
                columns = gathers[data] = self._gather(data, channels, site.node, taken)
            self._split(site, columns, channels, context.store, taken)
            rewrites.append(Rewrite(RULE, name, f"channels {channels.tolist()} in float"))
        return PassResult(tuple(rewrites), tuple(skips))

    def _gather(
        self,
        data: ir.Value,
        channels: npt.NDArray[np.int64],
        before: ir.Node,
        taken: set[str],
    ) -> ir.Value:
        graph = before.graph
        assert isinstance(graph, ir.Graph)
        name = fresh_name(f"{data.name}.outliers", taken)
        tensor = ir.tensor(channels, name=f"{name}.channels")
        index = add_initializer(graph, fresh_name(f"{name}.channels", taken), tensor)
        node = new_node(
            self.name, "Gather", [data, index], name, attributes={"axis": -1}, dtype=data.dtype
        )
        graph.insert_before(before, node)
        assert data.shape is not None
        node.outputs[0].shape = ir.Shape([*data.shape[:-1], len(channels)])
        return node.outputs[0]

    def _split(
        self,
        site: Site,
        columns: ir.Value,
        channels: npt.NDArray[np.int64],
        store: WeightStore,
        taken: set[str],
    ) -> None:
        node, weight, axis = site.node, site.weight, site.axes.reduction
        home = weight.graph
        assert isinstance(home, ir.Graph)
        values = np.array(read_all(site.tensor))
        rows = np.take(values, channels, axis=axis)
        np.moveaxis(values, axis, 0)[channels] = 0
        stem = weight.name or "weight"
        main = add_initializer(
            home,
            fresh_name(f"{stem}.inliers", taken),
            store.put(f"{stem}.inliers", values, site.tensor.dtype),
        )
        main.metadata_props[CREATED_BY] = self.name
        # [channels, N], whichever way the weight is stored, and times what a Gemm multiplies by.
        outlying = np.ascontiguousarray(rows if axis == 0 else rows.T)
        alpha = node.attributes.get("alpha")
        if alpha is not None:
            outlying = outlying * np.asarray(alpha.as_float(), outlying.dtype)
        extra = add_initializer(
            home,
            fresh_name(f"{stem}.outliers", taken),
            store.put(f"{stem}.outliers", outlying, site.tensor.dtype),
        )
        for use in list(weight.uses()):
            use.node.replace_input_with(use.idx, main)
        drop_unused_initializers([weight])
        self._add(node, columns, extra, taken)

    def _add(
        self,
        node: ir.Node,
        columns: ir.Value,
        extra: ir.Value,
        taken: set[str],
    ) -> None:
        """Add the float part behind the product, under the name of its result."""
        result = node.outputs[0]
        stem = result.name or node_name(node)
        product = new_node(
            self.name,
            "MatMul",
            [columns, extra],
            fresh_name(f"{stem}.of_outliers", taken),
            dtype=result.dtype,
        )
        annotate(
            product,
            scheme="float",
            rule=RULE,
            reason=f"outlier channels of the data of {node_name(node)}, which would coarsen the "
            "scale of all others",
        )
        add_to_result(node, product, fresh_name(f"{stem}.of_inliers", taken))


def _is_split(site: Site) -> bool:
    return site.weight.metadata_props.get(CREATED_BY) == RULE
