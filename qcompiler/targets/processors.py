"""What processors with tensor cores compute with, as data."""

from dataclasses import dataclass
from typing import Final

from qcompiler.errors import UsageError

_HALF: Final = ("FLOAT16",)
_FLOATS: Final = ("FLOAT", "FLOAT16", "BFLOAT16")
_INTEGERS: Final = ("INT8", "INT4")
_FLOAT8: Final = (*_INTEGERS, "FLOAT8E4M3FN")
_FLOAT4: Final = (*_FLOAT8, "FLOAT4E2M1")


@dataclass(frozen=True, slots=True)
class Processor:
    """One kind of processor, by its compute capability.

    Attributes:
        name: What builders of engines call it, such as "SM89".
        title: Its generation, and processors that have it.
        compute_types: ONNX names of the float types of its products.
        code_types: ONNX names of the quantized types that it decodes or multiplies.
        ridge: Rows that a product in float16 must have before its arithmetic takes longer than
            reading its weights: dense float16 operations per second, with float32 sums, over
            bytes of memory per second, of the processor of this kind for which it is largest
            (vendor's data sheets). Two operations and two bytes per weight cancel out.
    """

    name: str
    title: str
    compute_types: tuple[str, ...]
    code_types: tuple[str, ...]
    ridge: int


PROCESSORS: Final[tuple[Processor, ...]] = (
    # T4: 65 TFLOPS, 320 GB/s.
    Processor("SM75", "Turing: T4, RTX 20", _HALF, ("INT8",), 203),
    # A100 40 GB: 312, 1555.
    Processor("SM80", "Ampere: A100, A30", _FLOATS, _INTEGERS, 201),
    # A10: 125, 600.
    Processor("SM86", "Ampere: RTX 30, A10, A40", _FLOATS, _INTEGERS, 208),
    # Jetson AGX Orin 64 GB: 43, 205.
    Processor("SM87", "Ampere: Jetson Orin", _FLOATS, _INTEGERS, 208),
    # L40S: 362, 864.
    Processor("SM89", "Ada: RTX 40, L4, L40S", _FLOATS, _FLOAT8, 419),
    # H100 PCIe: 756, 2000.
    Processor("SM90", "Hopper: H100, H200", _FLOATS, _FLOAT8, 378),
    # B200: 2250, 8000.
    Processor("SM100", "Blackwell: B200", _FLOATS, _FLOAT4, 281),
    # Jetson AGX Thor: 259, 273.
    Processor("SM110", "Blackwell: Jetson Thor", _FLOATS, _FLOAT4, 948),
    # RTX PRO 6000: 504, 1792.
    Processor("SM120", "Blackwell: RTX 50, RTX PRO", _FLOATS, _FLOAT4, 281),
    # GB10: 125, 273.
    Processor("SM121", "Blackwell: GB10", _FLOATS, _FLOAT4, 458),
)
"""Which of them TensorRT-RTX builds what for was measured (`targets/tensorrt.py`); types of the
others are read from the vendor's support matrix. In float32, SM75 has no products there."""


def processors_named(*names: str) -> tuple[Processor, ...]:
    """Return the processors of these names, in the order of the table."""
    return tuple(processor for processor in PROCESSORS if processor.name in names)


def processor_of(text: str, known: tuple[Processor, ...]) -> Processor:
    """Return the processor that a user means: "sm86", "86", "8.6" and "sm_86" are SM86.

    Raises:
        UsageError: It is none of `known`.
    """
    digits = text.strip().lower().removeprefix("sm").lstrip("_").replace(".", "")
    found = next((one for one in known if one.name == f"SM{digits}"), None)
    if found is None:
        message = f"{text!r} is no processor that engines are built for"
        names = ", ".join(f"{one.name.lower()} ({one.title})" for one in known)
        raise UsageError(message, hint=f"known: {names}")
    return found


def without_type(processors: tuple[Processor, ...], code_type: str) -> tuple[str, ...]:
    """Return the names of those that have no such quantized type."""
    return tuple(one.name for one in processors if code_type not in one.code_types)
