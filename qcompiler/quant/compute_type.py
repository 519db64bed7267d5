"""The 16-bit types that a float model may be cast to."""

from enum import StrEnum


class ComputeType(StrEnum):
    """A 16-bit type to compute in."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def onnx_name(self) -> str:
        """Name of the ONNX element type."""
        return self.name

    @property
    def opset(self) -> int:
        """The opset from which on convolutions, pooling and recurrent ops take the type."""
        return 1 if self is ComputeType.FLOAT16 else 22

    @property
    def largest(self) -> float:
        """The largest finite number: 65504 or 3.39e38."""
        return 65504.0 if self is ComputeType.FLOAT16 else (2 - 2.0**-7) * 2.0**127

    @property
    def smallest_normal(self) -> float:
        """The smallest number that has all bits of the mantissa: 6.1e-5 or 1.2e-38."""
        return 2.0**-14 if self is ComputeType.FLOAT16 else 2.0**-126

    @property
    def smallest(self) -> float:
        """The smallest positive number: 6e-8 or 9.2e-41."""
        return self.smallest_normal * self.epsilon

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next number: 9.8e-4 or 7.8e-3."""
        return 2.0**-10 if self is ComputeType.FLOAT16 else 2.0**-7
