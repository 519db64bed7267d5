"""What islands are: parts of a weight, or whole weights, that keep more bits than the others.

Bits are counted as they are stored: values, indices and padding of islands beside codes, scales
and zero points. A code counts the bits of its scheme, so that 3-bit codes in 4-bit containers
count 3 for `average_bits`; `nbytes` counts the containers.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite, prod

import numpy as np
import numpy.typing as npt

from qcompiler.errors import UsageError
from qcompiler.quant.granularity import scale_shape
from qcompiler.quant.scheme import QSpec

Scores = npt.NDArray[np.float32]


class IslandKind(StrEnum):
    """What an island is made of."""

    WEIGHT = "weight"
    """Single weights at 16 bits, wherever they lie: the published method (TaCQ, section 3.2)."""
    COLUMN = "column"
    """Whole input channels of a product at 16 bits."""
    BLOCK = "block"
    """Groups of input channels, as large as a quantization block, at twice the bits or more."""
    NODE = "node"
    """Whole weights at 16, 8, 4, 3 or 2 bits, none at fewer than its scheme has."""


class Saliency(StrEnum):
    """By what weights are chosen.

    `W` is the weight, `G` its gradient, `Q` what it is rounded to, and `U` the factor of the
    inverse Hessian of its op's squared output error, `H^-1 = U^T U`.
    """

    TACQ = "tacq"
    """`|W| |G| |Q - W|` (arXiv 2504.07389)."""
    QAL = "qal"
    """`|G| |Q - W|`: how the loss changes, to first order."""
    MSG = "msg"
    """`|W| |G|`."""
    GRADIENT = "gradient"
    """`|G|`."""
    MAGNITUDE = "magnitude"
    """`|W|`."""
    SPQR = "spqr"
    """`(Q - W)^2 / U_jj^2`, as SpQR chooses outliers (arXiv 2306.03078, section 3)."""
    SLIM = "slim"
    """`W^2 / U_jj^2`, as SliM-LLM chooses groups for more bits (arXiv 2405.14917, section 3.2)."""
    RANDOM = "random"
    """Nothing: what any choice must beat."""

    @property
    def needs_gradient(self) -> bool:
        """Whether a loss must be differentiated."""
        return self in (Saliency.TACQ, Saliency.QAL, Saliency.MSG, Saliency.GRADIENT)

    @property
    def needs_hessian(self) -> bool:
        """Whether second moments of what ops multiply are needed; errors count squared then."""
        return self in (Saliency.SPQR, Saliency.SLIM)

    @property
    def needs_codes(self) -> bool:
        """Whether scores depend on what weights are rounded to."""
        return self in (Saliency.TACQ, Saliency.QAL, Saliency.SPQR)


@dataclass(frozen=True, slots=True)
class IslandBudget:
    """What islands may cost. Exactly one attribute is given.

    Attributes:
        average_bits: Bits per element over all planned weights, islands included.
        nbytes: Bytes of all planned weights, islands included.
        fraction: Part of the elements that may lie in islands, whatever they cost.
    """

    average_bits: float | None = None
    nbytes: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        given = [each for each in (self.average_bits, self.nbytes, self.fraction) if each]
        usable = all(isfinite(each) and each > 0 for each in given)
        if len(given) != 1 or not usable or (self.fraction or 0) > 1:
            message = "islands need one budget above 0"
            hint = "give --average-bits 3.1, --budget-bytes 90MB, or --island-fraction 0.0035"
            raise UsageError(message, where="--islands", hint=hint)

    @property
    def usual_kind(self) -> IslandKind:
        """What islands are made of where nobody says: whole weights, which have no fraction."""
        return IslandKind.NODE if self.fraction is None else IslandKind.COLUMN

    def room(self, base: int, elements: int, island_elements: int) -> int:
        """Return what islands may cost: bits, or elements where a fraction is the budget.

        Args:
            base: Bits that planned weights take without islands.
            elements: Elements of all planned weights.
            island_elements: Elements of the weights that can have islands.

        Raises:
            UsageError: Without any island the weights take more than that.
        """
        if self.fraction is not None:
            return int(self.fraction * island_elements)
        allowed = self.average_bits * elements if self.average_bits else 8 * (self.nbytes or 0)
        room = int(allowed - base)
        if room >= 0:
            return room
        least = f"{base / elements:.3f} bits per weight" if self.average_bits else f"{base // 8} B"
        message = f"without any island the quantized weights take {least}, which is above {self}"
        raise UsageError(message, where="--islands", hint="raise it, or take a smaller scheme")

    def __str__(self) -> str:
        if self.average_bits is not None:
            return f"--average-bits {self.average_bits:g}"
        if self.nbytes is not None:
            return f"--budget-bytes {self.nbytes}"
        return f"--island-fraction {self.fraction:g}"


@dataclass(frozen=True, slots=True)
class IslandRequest:
    """What is asked for.

    Attributes:
        saliency: By what weights are chosen.
        budget: What islands may cost.
        kind: What islands are made of.
        unit: Input channels are taken so many at a time, which kernels may want.
    """

    saliency: Saliency
    budget: IslandBudget
    kind: IslandKind
    unit: int = 1


def quantized_bits(shape: tuple[int, ...], spec: QSpec, float_bits: int, *, stored: bool) -> int:
    """Return the bits of codes, scales and zero points of a weight.

    Args:
        shape: Of the weight.
        spec: How it is quantized.
        float_bits: Of one scale.
        stored: Whether codes count their containers, which 3-bit codes share with 4-bit ones.
    """
    qtype = spec.qtype
    each = qtype.storage_bits if stored else qtype.bits
    zero = 0 if spec.symmetric and qtype.signed else qtype.storage_bits
    return prod(shape) * each + prod(scale_shape(shape, spec.granularity)) * (float_bits + zero)


def saliency_scores(
    measure: Saliency,
    weight: Scores,
    slope: Scores | None,
    rounded: Scores | None,
    seed: int,
) -> Scores:
    """Return how much each element of a weight matters, float32 of its shape, none below 0.

    Args:
        measure: By what.
        weight: The weight.
        slope: What an error of each element costs: the sum over samples of the absolute gradient,
            or `1 / U_jj^2` where the measure is of the Hessian; None where neither is asked for.
        rounded: What the weight's codes stand for; None where it is not asked for.
        seed: Of the random measure.
    """
    found = importance(measure, weight, slope, seed)
    if measure is Saliency.SLIM:
        return found * np.square(weight)
    if measure.needs_codes:
        assert rounded is not None
        found *= error_cost(measure, rounded - weight)
    return found


def importance(measure: Saliency, weight: Scores, slope: Scores | None, seed: int) -> Scores:
    """Return what the error of each element counts, whatever it is; arguments as of the scores."""
    if measure is Saliency.RANDOM:
        return np.random.default_rng(seed).random(weight.shape, np.float32)
    found = np.abs(weight) if measure in _OF_WEIGHT else np.ones_like(weight)
    if measure.needs_gradient or measure.needs_hessian:
        assert slope is not None
        found *= np.abs(slope)
    return found


def error_cost(measure: Saliency, error: Scores) -> Scores:
    """Return errors as a measure counts them: squared beside a Hessian, else their size."""
    return np.square(error) if measure.needs_hessian else np.abs(error)


_OF_WEIGHT = (Saliency.TACQ, Saliency.MSG, Saliency.MAGNITUDE)
