"""What quantization an op, and each of its tensors, gets."""

import re
from dataclasses import dataclass
from enum import StrEnum

from qcompiler.errors import UsageError
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.granularity import Granularity
from qcompiler.quant.qtype import FP8, QType, qtype_of


@dataclass(frozen=True, slots=True)
class PairLimit:
    """A bound on codes that a kernel multiplies and adds in pairs before it widens the sum.

    Integer kernels of CPUs without VNNI add two products of an unsigned 8-bit activation and a
    signed 8-bit weight in 16 bits, and saturate. Where no two neighbouring weight codes of one
    sign add up to more than 128, the sum stays within 255 * 128, and nothing saturates.

    Attributes:
        limit: The largest sum of the magnitudes of two neighbouring codes of one sign.
        axes: The reduction axes of the weight, outermost first, in the order of the kernel's sum:
            `(0,)` for a MatMul's [K, N], `(2, 3, 1)` for a Conv's [M, C, kH, kW], which kernels
            read channels last. The codes 2i and 2i+1 along them are neighbours.
    """

    limit: int
    axes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QSpec:
    """How one tensor is quantized.

    Attributes:
        qtype: The type of the codes.
        granularity: How many elements share a scale.
        symmetric: Whether the zero point is fixed at 0 (signed) or mid-range (unsigned).
        pairs: What neighbouring codes must keep to, None where kernels do not saturate.
    """

    qtype: QType
    granularity: Granularity
    symmetric: bool
    pairs: PairLimit | None = None


class Activations(StrEnum):
    """What happens to the data input of an op."""

    FLOAT = "float"
    """Stays in the model's float type: weight-only quantization."""
    DYNAMIC = "dynamic"
    """Quantized at run time, per tensor, from its own minimum and maximum."""
    STATIC = "static"
    """Quantized with a scale found by calibration."""


@dataclass(frozen=True, slots=True)
class QScheme:
    """The quantization of one op, before it is bound to the op's axes.

    Its text form is what recipes, options and node metadata hold:
    `w<bits>a<bits>[-dynamic][:b<block size>|:tensor][:sym|:asym]`, or `fp8[:tensor]`.

    | text             | weights                         | activations             |
    |------------------|---------------------------------|-------------------------|
    | `w8a16`          | 8 bit, per output channel       | float                   |
    | `w4a16:b128`     | 4 bit, blocks of 128            | float                   |
    | `w3a16:b128`     | 3 bit, stored in 4              | float                   |
    | `w2a16:b64:asym` | 2 bit, blocks of 64, zero point | float                   |
    | `w8a8`           | 8 bit, per output channel       | 8 bit, calibrated       |
    | `w4a8:b128`      | 4 bit, blocks of 128            | 8 bit, calibrated       |
    | `w4a4`           | 4 bit, per output channel       | 4 bit, calibrated       |
    | `w8a8:tensor`    | 8 bit, one scale for all        | 8 bit, calibrated       |
    | `w8a8-dynamic`   | 8 bit, per output channel       | 8 bit, scaled per run   |
    | `fp8`            | E4M3, per output channel        | E4M3, calibrated        |

    Attributes:
        weight_bits: 8, 4, 3 or 2.
        activations: Treatment of the data input.
        block_size: Elements per scale along the reduction axis; None is per output channel.
        symmetric: Whether weights have no zero point; None leaves the choice to the target.
        per_tensor: Whether one scale serves the whole weight; of 8 bits, without blocks.
        activation_bits: Of calibrated activations: 8 or 4; otherwise it is not consulted.
        floating: Whether the 8-bit codes of weights and calibrated activations are floats (E4M3).
    """

    weight_bits: int
    activations: Activations = Activations.FLOAT
    block_size: int | None = None
    symmetric: bool | None = None
    per_tensor: bool = False
    activation_bits: int = 8
    floating: bool = False

    def __str__(self) -> str:
        if self.floating:
            return f"{_FLOAT8}:tensor" if self.per_tensor else _FLOAT8
        static = self.activations is Activations.STATIC
        kept = str(self.activation_bits) if static else _TEXT_OF[self.activations]
        text = f"w{self.weight_bits}a{kept}"
        if self.block_size is not None:
            text += f":b{self.block_size}"
        if self.per_tensor:
            text += ":tensor"
        if self.symmetric is not None:
            text += ":sym" if self.symmetric else ":asym"
        return text

    def weight_spec(self, granularity: Granularity, pairs: PairLimit | None = None) -> QSpec:
        """Bind the weights to a granularity with real axes.

        Raises:
            ValueError: The scheme's symmetry was never decided.
        """
        if self.symmetric is None:
            message = f"the symmetry of {self} is undecided"
            raise ValueError(message)
        return QSpec(self.weight_type, granularity, self.symmetric, pairs)

    @property
    def weight_type(self) -> QType:
        """Type of the weights' codes; where the symmetry is undecided, the signed one."""
        return (
            FP8 if self.floating else qtype_of(self.weight_bits, signed=self.symmetric is not False)
        )

    def activation_type(self, *, signed: bool) -> QType:
        """Return the type of calibrated activations; that of integers a target wants `signed`."""
        return FP8 if self.floating else qtype_of(self.activation_bits, signed=signed)


_FLOAT8 = "fp8"
_TEXT_OF = {Activations.FLOAT: "16", Activations.DYNAMIC: "8-dynamic"}
_ACTIVATIONS = {text: activations for activations, text in _TEXT_OF.items()}

FLOAT = "float"
"""Text form of "leave this op in float"; `parse_scheme` gives None for it."""

SCHEME_FORMS = (
    "float",
    "w8a16",
    "w8a8",
    "w8a8:tensor",
    "w8a8-dynamic",
    "w4a8",
    "w4a4",
    "w4a16:b32",
    "w4a16:b128",
    "w3a16:b128",
    "w2a16:b64",
    "fp8",
    "fp8:tensor",
)
"""Examples of every family, for messages and `--list schemes`; block sizes are free."""

_PATTERN = re.compile(
    r"w(?P<weight>[2348])a(?P<activation>16|8-dynamic|8|4)"
    r"(?::b(?P<block>\d{1,6})|:(?P<tensor>tensor))?(?::(?P<symmetry>sym|asym))?"
)


def parse_scheme(text: str) -> QScheme | None:
    """Read a scheme from its text form; None means float.

    Raises:
        UsageError: Not a scheme this compiler knows; the message lists the forms.
    """
    if text == FLOAT:
        return None
    if text in (_FLOAT8, f"{_FLOAT8}:tensor"):
        return QScheme(8, Activations.STATIC, None, True, text.endswith(":tensor"), floating=True)
    match = _PATTERN.fullmatch(text)
    if text in set(ComputeType):
        message = f"{text} is a type for the whole model, not a scheme of one op"
        raise UsageError(message, hint=f'write "{FLOAT}", and compute_type = "{text}" beside it')
    if match is None and "fp4" in text:
        message = f"{text!r}: no scheme makes weights of 4-bit floats"
        hint = (
            "give w4a16:b32 (int4) or fp8; a graph in which another tool made NVFP4 weights goes "
            "through with --scheme float --target tensorrt-rtx:sm120"
        )
        raise UsageError(message, hint=hint, reason="no-fp4-scheme")
    if match is None:
        message = f"{text!r} is not a scheme"
        raise UsageError(
            message,
            hint=f"forms: {', '.join(SCHEME_FORMS)}; append :sym or :asym to fix the zero point",
        )
    block = int(match["block"]) if match["block"] else None
    activations = _ACTIVATIONS.get(match["activation"], Activations.STATIC)
    if block is not None and (block < 16 or block & (block - 1)):
        message = f"block size {block} of {text!r} is not a power of two of at least 16"
        raise UsageError(message, hint="kernels exist for 16, 32, 64, 128, 256, ...")
    whole_bytes = match["weight"] == "8" and block is None
    if activations is Activations.DYNAMIC and not whole_bytes:
        message = f"{text!r}: activations that are scaled per run need 8-bit weights per channel"
        raise UsageError(message, hint="use w8a8-dynamic")
    if activations is Activations.STATIC and match["weight"] == "8" and block is not None:
        message = f"{text!r}: 8-bit weights that multiply integers have no blocks"
        raise UsageError(message, hint="use w8a8")
    if match["tensor"] and match["weight"] != "8":
        message = f"{text!r}: one scale for a whole weight is too coarse below 8 bits"
        raise UsageError(message, hint=f"use w{match['weight']}a16:b128, or w8a8:tensor")
    symmetric = None if match["symmetry"] is None else match["symmetry"] == "sym"
    return QScheme(
        int(match["weight"]),
        activations,
        block,
        symmetric,
        match["tensor"] is not None,
        int(match["activation"]) if activations is Activations.STATIC else 8,
    )
