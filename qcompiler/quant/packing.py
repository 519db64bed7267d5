"""Codes of 8, 4 or 2 bits as ONNX stores them in `TensorProto.raw_data`.

ONNX packs the flattened (row-major) tensor low bits first: of two 4-bit codes in a byte the first
is bits 0-3, of four 2-bit codes the first is bits 0-1. Unused bits of the last byte are zero
(ONNX IR specification, `TensorProto.raw_data`).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]
"""Codes: int8 or uint8, one per element. Of floats of 8 bits, which NumPy has no class for, too."""

# Bytes of codes handled at once: the words in flight then stay in the L2 cache, and the
# temporaries do not grow with the tensor. A multiple of every word size.
_CHUNK = 1 << 17

_WORD: dict[int, np.dtype[Any]] = {4: np.dtype("<u2"), 2: np.dtype("<u4")}
"""One little-endian word holds, in its bytes, the codes that share one packed byte."""


def packed_size(count: int, storage_bits: int) -> int:
    """Return the bytes that `count` codes take."""
    return -(-count * storage_bits // 8)


def pack(codes: IntArray, storage_bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes into bytes.

    Args:
        codes: int8 or uint8 of any shape, one code per element. Where `storage_bits` is 8 and the
            array is contiguous the result shares its memory.
        storage_bits: 8, 4 or 2.

    Returns:
        uint8 of shape `[ceil(codes.size * storage_bits / 8)]`.

    Raises:
        ValueError: Another dtype or number of bits, or a code that does not fit.
    """
    _check_bits(storage_bits)
    if codes.dtype not in (np.int8, np.uint8):
        message = f"codes are {codes.dtype}, not int8 or uint8"
        raise ValueError(message)
    flat = np.ascontiguousarray(codes).reshape(-1)
    if storage_bits == 8:
        return flat.view(np.uint8)
    _check_fit(flat, storage_bits)
    raw = flat.view(np.uint8)
    packed = np.empty(packed_size(raw.size, storage_bits), np.uint8)
    per_byte = 8 // storage_bits
    whole = raw.size - raw.size % per_byte
    for start in range(0, whole, _CHUNK):
        words = raw[start : min(start + _CHUNK, whole)].view(_WORD[storage_bits])
        first = start // per_byte
        packed[first : first + words.size] = _squeeze(words, storage_bits)
    if whole < raw.size:
        last = np.zeros(per_byte, np.uint8)
        last[: raw.size - whole] = raw[whole:]
        packed[-1:] = _squeeze(last.view(_WORD[storage_bits]), storage_bits)
    return packed


def unpack(
    packed: npt.NDArray[np.uint8], storage_bits: int, shape: tuple[int, ...], signed: bool
) -> IntArray:
    """Unpack bytes into one code per element: the inverse of `pack`.

    Args:
        packed: uint8 of shape `[ceil(prod(shape) * storage_bits / 8)]`.
        storage_bits: 8, 4 or 2.
        shape: Shape of the result.
        signed: Whether codes are two's complement.

    Returns:
        A new int8 (signed) or uint8 array of `shape`.

    Raises:
        ValueError: Another number of bits, or `packed` does not have the size `shape` asks for.
    """
    _check_bits(storage_bits)
    count = 1
    for extent in shape:
        count *= extent
    if packed.dtype != np.uint8 or packed.size != packed_size(count, storage_bits):
        message = (
            f"{packed.size} elements of {packed.dtype} do not hold a tensor of shape "
            f"{list(shape)} at {storage_bits} bits"
        )
        raise ValueError(message)
    raw = np.ascontiguousarray(packed).reshape(-1)
    if storage_bits == 8:
        codes = raw.copy()
    else:
        words = np.empty(raw.size, _WORD[storage_bits])
        for start in range(0, raw.size, _CHUNK):
            words[start : start + _CHUNK] = _spread(raw[start : start + _CHUNK], storage_bits)
        codes = words.view(np.uint8)[:count]
        if signed:
            # Two's complement sign extension without a branch: (c ^ s) - s, s the sign bit.
            sign = np.uint8(1 << (storage_bits - 1))
            np.bitwise_xor(codes, sign, out=codes)
            np.subtract(codes, sign, out=codes)
    return codes.view(np.int8 if signed else np.uint8).reshape(shape)


def _squeeze(words: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """Move the low `bits` of every byte of each word together."""
    mask = (1 << bits) - 1
    result = words & mask
    for index in range(1, 8 // bits):
        result |= (words >> (8 - bits) * index) & (mask << bits * index)
    return result


def _spread(raw: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[Any]:
    """Give each code of a packed byte a byte of its own in a word."""
    words = raw.astype(_WORD[bits])
    result = words.copy()
    for index in range(1, 8 // bits):
        result |= words << (8 - bits) * index
    result &= sum(((1 << bits) - 1) << 8 * index for index in range(8 // bits))
    return result


def _check_bits(storage_bits: int) -> None:
    if storage_bits not in (8, 4, 2):
        message = f"codes are stored in 8, 4 or 2 bits, not {storage_bits}"
        raise ValueError(message)


def _check_fit(flat: IntArray, storage_bits: int) -> None:
    if flat.size == 0:
        return
    signed = flat.dtype == np.int8
    low = -(1 << (storage_bits - 1)) if signed else 0
    high = low + (1 << storage_bits) - 1
    smallest, largest = int(flat.min()), int(flat.max())
    if smallest < low or largest > high:
        message = (
            f"codes from {smallest} to {largest} do not fit {storage_bits} "
            f"{'signed' if signed else 'unsigned'} bits"
        )
        raise ValueError(message)
