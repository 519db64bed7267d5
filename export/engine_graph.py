"""Which types the products of a TensorRT-RTX engine have, read from the engine without a GPU.

An engine holds a description of its graph in text: tensors with their types, and the products that
are left to the library's kernels (`fully_connected`, `corrltn`, `deconvolution`) with their
operands. Seen in release 1.7.1; no document promises it, so an engine without it yields nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_KINDS: Final = {
    b"fully_connected": "MatMul",
    b"corrltn": "Conv",
    b"deconvolution": "ConvTranspose",
}
_TEXT: Final = re.compile(rb"[\t\n\x1f-\x7e]{200,}")
_TENSOR: Final = re.compile(
    rb'^ *tensor=\{[^\n]*? name="([^"]+)"[^\n]*? type=(\w+) \}', re.MULTILINE
)
_PRODUCT: Final = re.compile(
    rb'^ *(\w+)=\{ name="([^"]+)" output=\{([^}]*)\} input=\{([^}]*)\}', re.MULTILINE
)
_QUOTED: Final = re.compile(rb'"([^"]+)"')
_OPERANDS: Final = 2


@dataclass(frozen=True, slots=True)
class EngineProduct:
    """One product of an engine.

    Attributes:
        nodes: Names of the nodes that it computes: several where the builder merged them.
        op: MatMul (also of a Gemm), Conv or ConvTranspose.
        operands: Types of data and weight as it multiplies them, by the engine's names: "int8",
            "float", "half", "fp8_e4m3"; "" of a view, which has the type of the other operand.
    """

    nodes: tuple[str, ...]
    op: str
    operands: tuple[str, ...]

    @property
    def multiplies_integers(self) -> bool:
        """Whether both operands are 8-bit integers."""
        return set(self.operands) - {""} == {"int8"}


def products_of(engine: bytes) -> tuple[EngineProduct, ...]:
    """Return the products of an engine, in its order.

    Products that the builder put into a kernel of its own, as those of attention, are not among
    them.

    Args:
        engine: The bytes of a serialized engine.
    """
    found: list[EngineProduct] = []
    for text in _descriptions(engine):
        types = {match[1]: match[2].decode() for match in _TENSOR.finditer(text)}
        for match in _PRODUCT.finditer(text):
            if match[1] in _KINDS:
                operands = _QUOTED.findall(match[4])[:_OPERANDS]
                names = tuple(match[2].decode().split("+"))
                kinds = tuple(types.get(name, "") for name in operands)
                found.append(EngineProduct(names, _KINDS[match[1]], kinds))
    return tuple(found)


def _descriptions(engine: bytes) -> Iterator[bytes]:
    for match in _TEXT.finditer(engine):
        if b"tensor={ " in match[0]:
            yield match[0]
