"""Fourier transforms and what goes with them (ONNX operators, `Operators.md`)."""

import math
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import Array
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()
_COMPLEX: Final = 2
"""Elements of the last axis of a complex signal; a real one has one."""
_HAMMING: Final = 25 / 46
"""The exact fraction that 0.54 is short for."""


@TABLE.op("DFT", since=20, host=(1, 2))
def dft(call: Call, x: Tensor, length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """Return the Fourier transform of signals [..., 1 or 2] along an axis, as [..., 2].

    Signals are cut or zero-padded to the length. Of real ones, `onesided` keeps the half that
    tells the other; its inverse takes that half, and returns real signals, [..., 1].
    """
    return _transform(call, x, length, -2 if axis is None else int(axis.item()))


@TABLE.op("DFT", since=17, host=(1,))
def dft_by_attribute(call: Call, x: Tensor, length: Tensor | None = None) -> Tensor:
    """Return the same; before opset 20, the axis was an attribute."""
    return _transform(call, x, length, call.integer("axis", 1))


def _transform(call: Call, x: Tensor, length: Tensor | None, axis: int) -> Tensor:
    axis %= x.dim()
    if axis == x.dim() - 1:
        reason = "the last axis holds real and imaginary parts"
        raise call.refuse(reason)
    steps = None if length is None else int(length.item())
    half, inverse = call.integer("onesided", 0) == 1, call.integer("inverse", 0) == 1
    signal = _signal(x)
    if half and inverse:
        real: Tensor = torch.fft.irfft(signal, steps, axis)
        return real.unsqueeze(-1).to(x.dtype)
    if half:
        result = torch.fft.rfft(_real(call, signal), steps, axis)
    elif inverse:
        # Of a real signal, PyTorch's is a conjugate yet to be computed.
        result = torch.fft.ifft(signal, steps, axis).resolve_conj()
    else:
        result = torch.fft.fft(signal, steps, axis)
    return torch.view_as_real(result).to(x.dtype)


def _signal(x: Tensor) -> Tensor:
    """Return signals [..., 1 or 2] as real or complex numbers [...], in float32 or better."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.shape[-1] == _COMPLEX:
        return torch.view_as_complex(exact.contiguous())
    return exact.squeeze(-1)


def _real(call: Call, signal: Tensor) -> Tensor:
    if signal.is_complex():
        reason = "a onesided transform of a complex signal loses half of it"
        raise call.refuse(reason)
    return signal


@TABLE.op("STFT", since=17, host=(1, 3))
def stft(
    call: Call,
    x: Tensor,
    step: Tensor,
    window: Tensor | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """Return Fourier transforms [batch, frames, bins, 2] of windowed frames.

    Signals are [batch, samples, 1 or 2]; what does not fill a frame at the end is left out.
    """
    signal = _signal(x)
    if length is not None:
        size = int(length.item())
    else:
        size = signal.shape[1] if window is None else window.shape[0]
    frames = signal.unfold(1, size, int(step.item()))
    frames = frames if window is None else frames * window
    if call.integer("onesided", 1) == 1:
        result = torch.fft.rfft(_real(call, frames))
    else:
        result = torch.fft.fft(frames)
    return torch.view_as_real(result).to(x.dtype)


@TABLE.op("HannWindow", since=17, host=(0,))
def hann_window(call: Call, size: Tensor) -> Tensor:
    """Return `0.5 - 0.5 * cos(2 pi n / period)`, [size]."""
    return _cosines(call, size, (0.5, -0.5))


@TABLE.op("HammingWindow", since=17, host=(0,))
def hamming_window(call: Call, size: Tensor) -> Tensor:
    """Return `a - (1 - a) * cos(2 pi n / period)`, [size], with a = 25 / 46."""
    return _cosines(call, size, (_HAMMING, _HAMMING - 1))


@TABLE.op("BlackmanWindow", since=17, host=(0,))
def blackman_window(call: Call, size: Tensor) -> Tensor:
    """Return `0.42 - 0.5 * cos(2 pi n / period) + 0.08 * cos(4 pi n / period)`, [size]."""
    return _cosines(call, size, (0.42, -0.5, 0.08))


def _cosines(call: Call, size: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Return a sum of cosines over one period, which a symmetric window ends with."""
    count = int(size.item())
    period = count if call.integer("periodic", 1) == 1 else count - 1
    # The only element of a symmetric window would be 0 / 0.
    angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / max(period, 1))
    window = sum(factor * torch.cos(angles * order) for order, factor in enumerate(factors))
    assert isinstance(window, Tensor)
    dtype = call.element_type("output_datatype", ir.DataType.FLOAT)
    return window.to(call.device, call.elements.of(dtype))


@TABLE.op("MelWeightMatrix", since=17, host=(0, 1, 2, 3, 4))
def mel_weight_matrix(
    call: Call, bins: Tensor, length: Tensor, rate: Tensor, lowest: Tensor, highest: Tensor
) -> Tensor:
    """Return triangular filters at equal steps of the mel scale, [length // 2 + 1, bins].

    Args:
        call: The node.
        bins: How many filters.
        length: Of the Fourier transform they are applied to.
        rate: Samples per second.
        lowest: Hertz.
        highest: Hertz.
    """
    count, size = int(bins.item()), int(length.item())
    low, high = (2595 * math.log10(1 + float(edge) / 700) for edge in (lowest, highest))
    # As the operator's reference has it: the last edge is one step short of the highest one.
    mels = np.arange(count + 2) * ((high - low) / (count + 2)) + low
    hertz = 700 * (10 ** (mels / 2595) - 1)
    edges = ((size + 1) * hertz // int(rate.item())).astype(np.int64)
    filters = _triangles(edges, size // 2 + 1)
    dtype = call.element_type("output_datatype", ir.DataType.FLOAT)
    return torch.from_numpy(filters).to(call.device, call.elements.of(dtype))


def _triangles(edges: Array, rows: int) -> Array:
    """Return a column for every three edges in a row: from 0 up to 1 at the middle one, and down.

    Edges that fall on the same row leave a step.
    """
    row = np.arange(rows)[:, None]
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    up = np.where(middle > left, (row - left) / np.maximum(middle - left, 1), row == middle)
    down = (right - row) / np.maximum(right - middle, 1)
    rising = (row >= left) & ((row < middle) | ((row == middle) & (right == middle)))
    falling = (row >= middle) & (row < right)
    filters: Array = np.where(rising, up, np.where(falling, down, 0.0))
    return filters
