"""Products: MatMul, Gemm, Einsum, integer products (ONNX operators, `Operators.md`)."""

import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()


@TABLE.op("MatMul")
def matmul(_call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b`, [..., M, K] x [..., K, N], broadcast as NumPy does."""
    return torch.matmul(a, b)


@TABLE.op("Gemm")
def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Return `alpha * A' @ B' + beta * C`."""
    a = a.T if call.integer("transA", 0) else a
    b = b.T if call.integer("transB", 0) else b
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    product = a @ b
    if alpha != 1.0:
        product = product * alpha
    if c is None:
        return product
    return product + (c if beta == 1.0 else c * beta)


@TABLE.op("Einsum")
def einsum(call: Call, *operands: Tensor) -> Tensor:
    """Return a sum of products over named axes."""
    return torch.einsum(call.text("equation").replace(" ", ""), *operands)


@TABLE.op("MatMulInteger")
def matmul_integer(
    _call: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """Return the int32 product of codes less their zero points (A's per row, B's per column).

    Codes that carry gradients are floats of integral value; so is their product.
    """
    live = a.is_floating_point() or b.is_floating_point()
    dtype = torch.float64 if live else torch.int32
    left = a.to(dtype)
    right = b.to(dtype)
    if a_zero is not None:
        rows = a_zero.to(dtype)
        left = left - (rows.unsqueeze(-1) if rows.dim() == 1 and rows.numel() > 1 else rows)
    if b_zero is not None:
        right = right - b_zero.to(dtype)
    return left @ right if live else integer_product(left, right)


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` of int32 tensors, wrapping as int32 does.

    CUDA has no integer products: there, float64 is exact up to 2**53.
    """
    if left.is_cuda:
        return (left.double() @ right.double()).to(torch.int64).to(torch.int32)
    return torch.matmul(left, right)
