"""Gives activations whose values are few steps large a second term of codes."""

import json
from typing import ClassVar

import onnx_ir as ir

from qcompiler.calibration.grid_error import grid_of
from qcompiler.ir.dataflow import node_name
from qcompiler.ir.editing import fresh_name, value_names
from qcompiler.ir.provenance import (
    CREATED_BY,
    PREFIX,
    QUANTIZED_INPUTS,
    QUANTIZER,
    RANGE,
    TERMS,
    annotate,
    quantizer_of,
)
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.ir.substitution import add_to_result, new_node
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage

RULE = "expand-residuals"


class ExpandResiduals(Pass):
    """Multiply what the codes of an activation leave out as well, in integers too.

    Before: y = MatMul(x, w)                       # x: qcompiler.terms = "2"
    After:  y = Sum(MatMul(x, w), MatMul(Sub(x, x), w))
            # Sub reads its second input quantized; its result has a range of one step of x
    Refuses: nothing.

    Until quantizers are inserted the difference is zero. Then it is what rounding x took away, in
    steps 254 times as small, so that two products of 8 bits see 15 bits of x: activations between
    a gate and a down projection are so heavy-tailed that their typical value is one or two steps
    of a scale that covers them all. Expanding a tensor into residuals of residuals is that of REx
    (Yvinec et al. 2022), there of weights.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Expand every product whose data is to have two terms."""
        rewrites: list[Rewrite] = []
        taken = value_names(model) | {node.name for node in model.graph.all_nodes() if node.name}
        residuals: dict[ir.Value, ir.Value] = {}
        for site in find_sites(model)[0]:
            data = None if site.row.data is None else site.node.inputs[site.row.data]
            if data is None or not {TERMS, QUANTIZER} <= data.metadata_props.keys():
                continue
            if QUANTIZED_INPUTS not in site.node.metadata_props or _is_expanded(site):
                continue
            if data not in residuals:
                residuals[data] = self._residual(data, taken)
            self._expand(site, residuals[data], taken)
            rewrites.append(Rewrite(RULE, node_name(site.node), f"{data.name} in two terms"))
        return PassResult(tuple(rewrites))

    def _residual(self, data: ir.Value, taken: set[str]) -> ir.Value:
        """Return what the codes of a value leave out, ready to be quantized itself."""
        graph = data.graph
        assert isinstance(graph, ir.Graph)
        name = fresh_name(f"{data.name}.residual", taken)
        node = new_node(self.name, "Sub", [data, data], name, dtype=data.dtype)
        node.metadata_props[QUANTIZED_INPUTS] = json.dumps([1])
        residual = node.outputs[0]
        residual.shape = data.shape
        qtype, symmetric = quantizer_of(data)
        low, high = json.loads(data.metadata_props[RANGE])
        half = grid_of(low, high, qtype, symmetric=symmetric).scale / 2
        residual.metadata_props[QUANTIZER] = (
            data.metadata_props[QUANTIZER].partition(":")[0] + ":sym"
        )
        residual.metadata_props[RANGE] = json.dumps([-half, half])
        producer = data.producer()
        if producer is None:
            graph.insert_before(graph[0], node)
        else:
            graph.insert_after(producer, node)
        return residual

    def _expand(self, site: Site, residual: ir.Value, taken: set[str]) -> None:
        node = site.node
        stem = node.outputs[0].name or node_name(node)
        inputs = list(node.inputs[:2])
        assert site.row.data is not None
        inputs[site.row.data] = residual
        second = new_node(
            self.name,
            node.op_type,
            inputs,
            fresh_name(f"{stem}.of_residual", taken),
            dtype=node.outputs[0].dtype,
        )
        second.attributes.update(node.attributes)
        facts = {k: v for k, v in node.metadata_props.items() if k.startswith(PREFIX)}
        second.metadata_props.update({**facts, CREATED_BY: self.name})
        annotate(second, reason=f"what the codes of the data of {node_name(node)} leave out")
        # ONNX Runtime makes a float Gemm of a matrix product and an Add.
        add_to_result(node, second, fresh_name(f"{stem}.of_codes", taken), "Sum")


def _is_expanded(site: Site) -> bool:
    """Whether the product is one of two already: they share their weight."""
    nodes = (use.node for use in site.weight.uses())
    return any(node.metadata_props.get(CREATED_BY) == RULE for node in nodes)
