"""What weight-only models are compared with: ONNX Runtime's own `MatMulNBitsQuantizer`.

It rewrites every MatMul whose second input is a 2-D initializer as `MatMulNBits`, and nothing else
by default: no Gemm, no lookup, no product with a transposed initializer (a tied embedding).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

Algorithm = Literal["rtn", "hqq", "k-quant"]
_EXTERNAL_FROM_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Peer:
    """One setting of the peer.

    Attributes:
        algorithm: `rtn` is `DefaultWeightOnlyQuantConfig`, the default; `hqq` and `k-quant` are
            asymmetric always, and `hqq` stores float zero points.
        bits: Bits of a code: 8, 4 or 2.
        block_size: Elements per scale, along the reduction axis.
        symmetric: Whether there is no zero point.
    """

    algorithm: Algorithm
    bits: int
    block_size: int
    symmetric: bool = False

    def __str__(self) -> str:
        text = f"ort-{self.algorithm}:w{self.bits}:b{self.block_size}"
        return f"{text}:{'sym' if self.symmetric else 'asym'}" if self.algorithm == "rtn" else text


PEERS = (
    *(Peer("rtn", 4, block, symmetric) for block in (32, 128) for symmetric in (False, True)),
    *(Peer("hqq", 4, block) for block in (32, 128)),
    *(Peer("k-quant", 4, block) for block in (32, 128)),
    Peer("rtn", 8, 32),
    Peer("rtn", 8, 128),
    Peer("rtn", 2, 64),
    Peer("hqq", 2, 64),
)


def quantize(source: Path, output: Path, peer: Peer) -> None:
    """Quantize `source` and write it to `output`, weights beside it where they are large."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source),
        bits=peer.bits,
        block_size=peer.block_size,
        is_symmetric=peer.symmetric,
        algo_config=_configuration(peer),
    )
    quantizer.process()
    model: onnx.ModelProto = quantizer.model.model
    external = source.with_name(f"{source.name}.data").exists()
    if external or model.ByteSize() > _EXTERNAL_FROM_BYTES:
        onnx.save(model, output, save_as_external_data=True, location=f"{output.name}.data")
    else:
        onnx.save(model, output)


def _configuration(peer: Peer) -> Any:
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    if peer.algorithm == "hqq":
        return library.HQQWeightOnlyQuantConfig(block_size=peer.block_size, bits=peer.bits)
    if peer.algorithm == "k-quant":
        return library.KQuantWeightOnlyQuantConfig()
    return library.DefaultWeightOnlyQuantConfig(
        block_size=peer.block_size, is_symmetric=peer.symmetric, bits=peer.bits
    )
