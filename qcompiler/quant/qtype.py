"""Types that codes are made of: integers, and floats of 8 bits."""

from dataclasses import dataclass

from qcompiler.errors import UsageError


@dataclass(frozen=True, slots=True)
class QType:
    """A range of codes and the ONNX element type that stores them.

    A type may be narrower than its storage: 3-bit codes live in ONNX INT4, since ONNX has no
    3-bit type, and are counted at 4 bits wherever a size is reported.

    Attributes:
        name: Short name, such as "int4".
        bits: Bits of information: `qmax - qmin + 1 == 2**bits`.
        qmin: Smallest code.
        qmax: Largest code.
        onnx_name: Name of the ONNX element type in `TensorProto.DataType`, such as "INT4".
        storage_bits: Bits one code takes in a file.
        floating: Whether codes are floating-point numbers, whose steps grow with their size, and
            not integers. `qmin` and `qmax` are then the ends of the range, and zero points 0.
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    onnx_name: str
    storage_bits: int
    floating: bool = False

    @property
    def signed(self) -> bool:
        """Whether negative codes exist."""
        return self.qmin < 0

    def __str__(self) -> str:
        return self.name


INT8 = QType("int8", 8, -128, 127, "INT8", 8)
UINT8 = QType("uint8", 8, 0, 255, "UINT8", 8)
INT4 = QType("int4", 4, -8, 7, "INT4", 4)
UINT4 = QType("uint4", 4, 0, 15, "UINT4", 4)
INT3 = QType("int3", 3, -4, 3, "INT4", 4)
UINT3 = QType("uint3", 3, 0, 7, "UINT4", 4)
INT2 = QType("int2", 2, -2, 1, "INT2", 2)
UINT2 = QType("uint2", 2, 0, 3, "UINT2", 2)
FP8 = QType("fp8", 8, -448, 448, "FLOAT8E4M3FN", 8, floating=True)
"""E4M3 (Micikevicius et al. 2022, arXiv:2209.05433): 4 bits of exponent, 3 of mantissa, finite."""

QTYPES = (INT8, UINT8, INT4, UINT4, INT3, UINT3, INT2, UINT2, FP8)


def qtype_named(name: str) -> QType:
    """Return the type called `name`, such as "uint8".

    Raises:
        UsageError: No such type; the message lists the ones that exist.
    """
    for qtype in QTYPES:
        if qtype.name == name:
            return qtype
    known = ", ".join(qtype.name for qtype in QTYPES)
    message = f"{name!r} is not a type of codes"
    raise UsageError(message, hint=f"known: {known}")


def qtype_of(bits: int, *, signed: bool) -> QType:
    """Return the integer type with `bits` bits of information.

    Raises:
        UsageError: No such type; the message lists the ones that exist.
    """
    for qtype in QTYPES:
        if qtype.bits == bits and qtype.signed == signed and not qtype.floating:
            return qtype
    known = ", ".join(qtype.name for qtype in QTYPES if not qtype.floating)
    message = f"no {'signed' if signed else 'unsigned'} {bits}-bit integer type"
    raise UsageError(message, hint=f"known: {known}")
