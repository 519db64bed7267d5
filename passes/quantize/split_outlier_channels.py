"""Takes the outlier channels of an activation out of the integer product."""

import json
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.ir.dataflow import node_name
from qcompiler.ir.provenance import CREATED_BY, OUTLIERS, QUANTIZED_INPUTS, annotate
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.ir.side_paths import SidePathBuilder
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
        builder = SidePathBuilder(model, context.store, self.name, main="inliers", side="outliers")
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
            side = builder.split_channels(site, channels)
            annotate(
                side.node,
                scheme="float",
                rule=RULE,
                reason=f"outlier channels of the data of {name}, which would coarsen the scale of "
                "all others",
            )
            rewrites.append(Rewrite(RULE, name, f"channels {channels.tolist()} in float"))
        return PassResult(tuple(rewrites), tuple(skips))


def _is_split(site: Site) -> bool:
    return site.weight.metadata_props.get(CREATED_BY) == RULE
