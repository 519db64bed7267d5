"""Random numbers (ONNX operators, `Operators.md`).

A node with a seed draws the same numbers in every run; without, PyTorch's own generator goes on.
Neither gives the numbers that another runtime draws.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()


@TABLE.op("RandomNormal")
def random_normal(call: Call) -> Tensor:
    """Return normally distributed numbers of a given shape."""
    return _normal(call, call.integers("shape"), _named_type(call), call.device)


@TABLE.op("RandomNormalLike")
def random_normal_like(call: Call, x: Tensor) -> Tensor:
    """Return normally distributed numbers of the input's shape, and type if no other is named."""
    return _normal(call, x.shape, _type_like(call, x), x.device)


@TABLE.op("RandomUniform")
def random_uniform(call: Call) -> Tensor:
    """Return evenly distributed numbers of a given shape."""
    return _uniform(call, call.integers("shape"), _named_type(call), call.device)


@TABLE.op("RandomUniformLike")
def random_uniform_like(call: Call, x: Tensor) -> Tensor:
    """Return evenly distributed numbers of the input's shape, and type if no other is named."""
    return _uniform(call, x.shape, _type_like(call, x), x.device)


@TABLE.op("Bernoulli", since=15)
def bernoulli(call: Call, chances: Tensor) -> Tensor:
    """Return 1 with the given chances, and 0 otherwise."""
    drawn = torch.bernoulli(chances, generator=_generator(call, chances.device))
    return drawn.to(_type_like(call, chances))


@TABLE.op("Multinomial", since=7)
def multinomial(call: Call, scores: Tensor) -> Tensor:
    """Return classes, [batch, samples], drawn by unnormalized log-probabilities, [batch, C]."""
    shares = torch.softmax(scores, -1, dtype=torch.float32)
    drawn = torch.multinomial(
        shares,
        call.integer("sample_size", 1),
        replacement=True,
        generator=_generator(call, scores.device),
    )
    return drawn.to(call.elements.of(call.element_type("dtype", ir.DataType.INT32)))


def _normal(call: Call, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    drawn = _drawn(call, torch.randn, shape, dtype, device)
    return drawn * call.number("scale", 1.0) + call.number("mean", 0.0)


def _uniform(call: Call, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    low, high = call.number("low", 0.0), call.number("high", 1.0)
    return _drawn(call, torch.rand, shape, dtype, device) * (high - low) + low


def _drawn(
    call: Call,
    function: Callable[..., Tensor],
    shape: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return function(tuple(shape), generator=_generator(call, device), dtype=dtype, device=device)


def _generator(call: Call, device: torch.device) -> torch.Generator | None:
    if not call.has("seed"):
        return None
    # The seed is a float; its whole part is what other runtimes take as well.
    return torch.Generator(device).manual_seed(int(call.number("seed")))


def _named_type(call: Call) -> torch.dtype:
    return call.elements.of(call.element_type("dtype", ir.DataType.FLOAT))


def _type_like(call: Call, x: Tensor) -> torch.dtype:
    return call.elements.of(call.element_type("dtype")) if call.has("dtype") else x.dtype
