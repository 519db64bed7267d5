"""What quantization an op, and each of its tensors, gets."""

import re
from dataclasses import dataclass
from enum import StrEnum

from qcompiler.errors import UsageError
from qcompiler.quant.granularity import Granularity
from qcompiler.quant.qtype import QType, qtype_of


@dataclass(frozen=True, slots=True)
class QSpec:
    """How one tensor is quantized.

    Attributes:
        qtype: The integer type of the codes.
        granularity: How many elements share a scale.
        symmetric: Whether the zero point is fixed at 0 (signed) or mid-range (unsigned).
    """

    qtype: QType
    granularity: Granularity
    symmetric: bool


class Activations(StrEnum):
    """What happens to the data input of an op."""

    FLOAT = "float"
    """Stays in the model's float type: weight-only quantization."""
    DYNAMIC = "dynamic"
    """Quantized at run time, per tensor, from its own minimum and maximum."""


@dataclass(frozen=True, slots=True)
class QScheme:
    """The quantization of one op, before it is bound to the op's axes.

    Its text form is what recipes, options and node metadata hold:
    `w<bits>a<bits>[-dynamic][:b<block size>][:sym|:asym]`.

    | text             | weights                         | activations             |
    |------------------|---------------------------------|-------------------------|
    | `w8a16`          | 8 bit, per output channel       | float                   |
    | `w4a16:b128`     | 4 bit, blocks of 128            | float                   |
    | `w3a16:b128`     | 3 bit, stored in 4              | float                   |
    | `w2a16:b64:asym` | 2 bit, blocks of 64, zero point | float                   |
    | `w8a8-dynamic`   | 8 bit, per output channel       | 8 bit, scaled per run   |
    | `w7a8-dynamic`   | 7 bit, stored in 8              | the same; no saturation |

    Attributes:
        weight_bits: 8, 7, 4, 3 or 2.
        activations: Treatment of the data input.
        block_size: Elements per scale along the reduction axis; None is per output channel.
        symmetric: Whether weights have no zero point; None leaves the choice to the target.
    """

    weight_bits: int
    activations: Activations = Activations.FLOAT
    block_size: int | None = None
    symmetric: bool | None = None

    def __str__(self) -> str:
        text = f"w{self.weight_bits}" + (
            "a8-dynamic" if self.activations is Activations.DYNAMIC else "a16"
        )
        if self.block_size is not None:
            text += f":b{self.block_size}"
        if self.symmetric is not None:
            text += ":sym" if self.symmetric else ":asym"
        return text

    def weight_spec(self, granularity: Granularity) -> QSpec:
        """Bind the weights to a granularity with real axes.

        Raises:
            ValueError: The scheme's symmetry was never decided.
        """
        if self.symmetric is None:
            message = f"the symmetry of {self} is undecided"
            raise ValueError(message)
        return QSpec(qtype_of(self.weight_bits, signed=self.symmetric), granularity, self.symmetric)


FLOAT = "float"
"""Text form of "leave this op in float"; `parse_scheme` gives None for it."""

SCHEME_FORMS = (
    "float",
    "w8a16",
    "w8a8-dynamic",
    "w7a8-dynamic",
    "w4a16:b32",
    "w4a16:b128",
    "w3a16:b128",
    "w2a16:b64",
)
"""Examples of every family, for messages and `--list schemes`; block sizes are free."""

_PATTERN = re.compile(
    r"w(?P<weight>[23478])a(?P<activation>16|8-dynamic)"
    r"(?::b(?P<block>\d{1,6}))?(?::(?P<symmetry>sym|asym))?"
)


def parse_scheme(text: str) -> QScheme | None:
    """Read a scheme from its text form; None means float.

    Raises:
        UsageError: Not a scheme this compiler knows; the message lists the forms.
    """
    if text == FLOAT:
        return None
    match = _PATTERN.fullmatch(text)
    if match is None:
        message = f"{text!r} is not a scheme"
        raise UsageError(
            message,
            hint=f"forms: {', '.join(SCHEME_FORMS)}; append :sym or :asym to fix the zero point",
        )
    block = int(match["block"]) if match["block"] else None
    dynamic = match["activation"] != "16"
    if block is not None and (block < 16 or block & (block - 1)):
        message = f"block size {block} of {text!r} is not a power of two of at least 16"
        raise UsageError(message, hint="kernels exist for 16, 32, 64, 128, 256, ...")
    if dynamic and (match["weight"] not in "78" or block is not None):
        message = f"{text!r}: dynamic activations need 8- or 7-bit weights per output channel"
        raise UsageError(message, hint="use w8a8-dynamic")
    if match["weight"] == "7" and not dynamic:
        message = f"{text!r}: 7-bit weights are for 8-bit activations, which they cannot saturate"
        raise UsageError(message, hint="use w8a16")
    symmetric = None if match["symmetry"] is None else match["symmetry"] == "sym"
    return QScheme(
        int(match["weight"]),
        Activations.DYNAMIC if dynamic else Activations.FLOAT,
        block,
        symmetric,
    )
