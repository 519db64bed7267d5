"""Random quantized weights, as the inputs and attributes of a DequantizeLinear."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor, scale_shape


@dataclass(frozen=True)
class CodedWeight:
    """A quantized weight under some name.

    Attributes:
        name: Name of the codes; scale and zero point are called `<name>_s` and `<name>_z`.
        weights: Initializers by name.
        granularity: How scales are shared.
    """

    name: str
    weights: dict[str, ir.TensorProtocol]
    granularity: Granularity

    def dequantize(self, output: str, *, node: str | None = None) -> str:
        """Return the text of a DequantizeLinear that computes `output`."""
        inputs = ", ".join(self.weights)
        label = f"[{node}] " if node else ""
        return f"{label}{output} = DequantizeLinear{self._attributes()}({inputs})"

    def _attributes(self) -> str:
        if isinstance(self.granularity, PerBlock):
            return f"<axis={self.granularity.axis}, block_size={self.granularity.block_size}>"
        if isinstance(self.granularity, PerAxis):
            return f"<axis={self.granularity.axis}>"
        return ""

    def values(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the dequantized weight, computed by NumPy in float64."""
        codes = self.weights[self.name].numpy().astype(np.float64)
        scale = self._spread(f"{self.name}_s", codes.shape)
        zero = f"{self.name}_z"
        offset = self._spread(zero, codes.shape) if zero in self.weights else 0.0
        result: np.ndarray[Any, np.dtype[np.float64]] = (codes - offset) * scale
        return result

    def _spread(self, name: str, shape: tuple[int, ...]) -> Any:
        values = self.weights[name].numpy().astype(np.float64)
        if isinstance(self.granularity, PerTensor):
            return values
        axis = self.granularity.axis
        if isinstance(self.granularity, PerAxis):
            return values.reshape([-1 if index == axis else 1 for index in range(len(shape))])
        repeated = np.repeat(values, self.granularity.block_size, axis=axis)
        return np.take(repeated, range(shape[axis]), axis=axis)


def coded_weight(
    shape: tuple[int, ...],
    granularity: Granularity,
    *,
    bits: int,
    signed: bool,
    zero_point: bool | None = None,
    name: str = "w",
    scale_type: ir.DataType = ir.DataType.FLOAT,
    code_range: tuple[int, int] | None = None,
    code_type: ir.DataType | None = None,
    seed: int = 0,
) -> CodedWeight:
    """Return random codes, scales and zero points.

    Args:
        shape: Shape of the weight.
        granularity: How scales are shared.
        bits: Storage bits of a code: 8, 4 or 2.
        signed: Whether codes are signed.
        zero_point: Whether there is one; None means for unsigned codes only.
        name: Name of the codes.
        scale_type: Float type of the scales.
        code_range: Smallest and largest code, None for all of the type's.
        code_type: Another type than the integer of so many bits, for codes that it holds.
        seed: Seed of the generator.
    """
    generator = np.random.default_rng(seed)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    low, high = code_range or (low, high)
    dtype = code_type or ir.DataType[f"{'INT' if signed else 'UINT'}{bits}"]
    scales = scale_shape(shape, granularity)

    def tensor(values: Any, element: ir.DataType, label: str) -> ir.TensorProtocol:
        return ir.tensor(np.asarray(values).astype(element.numpy()), dtype=element, name=label)

    weights = {
        name: tensor(generator.integers(low, high + 1, shape), dtype, name),
        f"{name}_s": tensor(generator.uniform(0.01, 0.02, scales), scale_type, f"{name}_s"),
    }
    if zero_point if zero_point is not None else not signed:
        points = generator.integers(low, high + 1, scales)
        weights[f"{name}_z"] = tensor(points, dtype, f"{name}_z")
    return CodedWeight(name, weights, granularity)


def opset_for(bits: int) -> int:
    """Return the opset whose DequantizeLinear knows codes of so many bits."""
    return 25 if bits == 2 else 21
