"""Asking a target about a weight of a graph."""

from math import prod

from qcompiler.ir.quantizable import Site
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.scheme import QScheme
from qcompiler.targets.capability import SchemeRequest


def request_for(
    site: Site,
    scheme: QScheme,
    *,
    tied: bool,
    in_body: bool,
    compute_type: ComputeType | None = None,
) -> SchemeRequest:
    """Return the request to give a site a scheme.

    Args:
        site: Where the weight is.
        scheme: What is asked for.
        tied: Whether several ops share the weight.
        in_body: Whether the op lies in an If, Loop or Scan body.
        compute_type: What float32 is going to be cast to, None where it stays.
    """
    narrowed = compute_type is not None and site.tensor.dtype.name == "FLOAT"
    return SchemeRequest(
        op_type=site.row.op_type,
        domain=site.row.domain,
        scheme=scheme,
        float_type=(
            compute_type.onnx_name if compute_type and narrowed else site.tensor.dtype.name
        ),
        reduction=site.reduction,
        outputs=site.outputs,
        weight_rank=len(site.shape),
        elements=site.tensor.size,
        transposed=site.transposed,
        tied=tied,
        left=site.left,
        in_body=in_body,
        rows=_rows(site),
    )


def _rows(site: Site) -> int | None:
    """Return by how many rows of data the weight is multiplied, None where shapes are open."""
    shape = site.node.outputs[0].shape
    if site.row.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose") or shape is None:
        return None
    sizes = [size for size in shape if isinstance(size, int)]
    return prod(sizes) // max(1, site.outputs) if len(sizes) == len(shape) else None
