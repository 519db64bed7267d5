"""Looks rows up in a table of codes, in place of dequantizing the table at each run."""

from typing import ClassVar

import onnx_ir as ir

from qcompiler.ir.byte_codes import CodedMatrix, coded_matrix, shared_bytes
from qcompiler.ir.dataflow import MICROSOFT, all_nodes, int_attribute, is_op, node_name
from qcompiler.ir.substitution import needs_microsoft_ops, new_node, substitute
from qcompiler.passes.lower.stored_bytes import record_stored_bytes
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE = "lower-embedding"


class LowerEmbeddings(Pass):
    """Turn a lookup in a dequantized table into GatherBlockQuantized.

    ONNX Runtime does not fuse DequantizeLinear and Gather: it dequantizes all rows at each run,
    measured at 7 to 330 times the float lookup. GatherBlockQuantized takes 0.5 to 1.0 of it.

    Before: y = Gather(DequantizeLinear(codes [V, D], scale [V, D/B]), ids)
    After:  y = GatherBlockQuantized(bytes uint8 [V, D * bits/8], ids, scale, zero points)
    Refuses: lookups along another axis than rows; blocks along the rows' axis; one scale for the
        whole table; rows that do not end on a byte; bfloat16 tables (no CPU kernel).

    Unsigned codes keep their bytes; signed ones are rewritten with the sign bit flipped.
    """

    name: ClassVar[str] = "lower-embeddings"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite every Gather over a DequantizeLinear with constant inputs."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for node in list(all_nodes(model)):
            if not is_op(node, "Gather") or node.inputs[0] is None:
                continue
            producer = node.inputs[0].producer()
            if not is_op(producer, "DequantizeLinear"):
                continue
            table = coded_matrix(producer)
            reason = _refusal(node, table)
            if reason or table is None:
                skips.append(Skip(RULE, node_name(node), reason))
                continue
            rewrites.append(Rewrite(RULE, node_name(node), f"{table.bits}-bit rows"))
            self._lower(node, table, context)
            needs_microsoft_ops(model)
        record_stored_bytes(model, self.name)
        return PassResult(tuple(rewrites), tuple(skips))

    def _lower(self, node: ir.Node, table: CodedMatrix, context: PassContext) -> None:
        data = shared_bytes(table, context.store)
        gather = new_node(
            self.name,
            "GatherBlockQuantized",
            [data.codes, node.inputs[1], data.scale, data.zero_point]
            if data.zero_point is not None
            else [data.codes, node.inputs[1], data.scale],
            node_name(node),
            domain=MICROSOFT,
            attributes={
                "bits": table.bits,
                "block_size": table.block_size or table.row_block,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
        )
        substitute(node, [gather])


def _refusal(node: ir.Node, table: CodedMatrix | None) -> str:
    """Return why a lookup stays as it is, "" if it can be rewritten."""
    if table is None:
        return (
            "the table is not a matrix of constant 8-, 4- or 2-bit codes with a scale per row or "
            "block, so ONNX Runtime dequantizes all of it at each run"
        )
    if int_attribute(node, "axis", 0) not in (0, -2):
        return "it looks up columns, and GatherBlockQuantized looks up rows"
    if table.axis != 1:
        return "the blocks of the table cut across its rows"
    if table.block_size is not None and table.block_size & (table.block_size - 1):
        return f"blocks of {table.block_size} are not a power of two"
    if table.block_size is not None and table.block_size < 16:
        return f"GatherBlockQuantized has no blocks of {table.block_size}, below 16"
    if table.shape[1] * table.bits % 8:
        return f"rows of {table.shape[1]} codes of {table.bits} bits do not end on a byte"
    if table.dequantize.outputs[0].dtype == ir.DataType.BFLOAT16:
        return "ONNX Runtime's CPU kernel returns float32 or float16, not bfloat16"
    return ""
