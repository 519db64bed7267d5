"""What can be chosen of learning codes and step sizes window by window (CBQ)."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from qcompiler.errors import UsageError


class Start(StrEnum):
    """Which codes learning starts from."""

    NEAREST = "nearest"
    """Those of `insert-qdq`."""
    GPTQ = "gptq"
    """Those of `round-weights`."""


class Learned(StrEnum):
    """What is learned of a weight."""

    STEP_SIZES = "step-sizes"
    """One factor for each scale; codes stay."""
    LORA = "lora"
    """That, and positions moved by a product of two thin matrices (CBQ's LoRA-Rounding)."""
    FULL = "full"
    """That, and every position by itself (AdaRound)."""


class Rounding(StrEnum):
    """How positions become codes while they are learned."""

    HARD = "hard"
    """To the nearest, with a straight-through gradient: what is learned is what will be."""
    SOFT = "soft"
    """Between two neighbours by a rectified sigmoid, which a regularizer drives to 0 or 1."""


class Compute(StrEnum):
    """The type that windows run in while they are learned."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Preset(StrEnum):
    """How much time learning takes."""

    FAST = "fast"
    """Step sizes only."""
    DEFAULT = "default"
    BEST = "best"
    """Three times the steps of the default."""


@dataclass(frozen=True, slots=True)
class BlockReconstruction:
    """How codes and step sizes are learned.

    Attributes:
        start: Which codes it starts from.
        window: Blocks in a window.
        overlap: Blocks that a window shares with the one before.
        layers: Whether blocks are layers, joined of several where they repeat; otherwise they are
            as small as can be.
        logits: Whether a last window reaches the graph's outputs and is judged by the divergence
            of their softmax.
        steps: Steps of Adam in a window.
        batch: Calls in a step.
        learned: What is learned of weights.
        rounding: How positions become codes.
        rank: Of the matrices of `lora`.
        scale_rate: Learning rate of the weights' step sizes, as a part of them, for 2 bits; each
            bit more halves it.
        code_rate: Learning rate of positions, in codes, or of the matrices that move them.
        activation_rate: The same of the activations' step sizes.
        kl: Weight of the divergence of the softmax over channels, beside the squared error.
        homologous: Whether a window shall also do to its own data what the float one does to it.
        regularizer: Weight of the regularizer of soft rounding, which is a mean over codes.
        compute: The type that windows run in. What is learned, and windows with quantized
            activations, are in float32.
        seed: Of the order of calls and the random half of `lora`.
    """

    start: Start = Start.GPTQ
    window: int = 2
    overlap: int = 1
    layers: bool = True
    logits: bool = False
    steps: int = 96
    batch: int = 1
    learned: Learned = Learned.FULL
    rounding: Rounding = Rounding.HARD
    rank: int = 5
    scale_rate: float = 1.5e-2
    code_rate: float = 3e-3
    activation_rate: float = 1.5e-2
    kl: float = 0.0
    homologous: bool = False
    regularizer: float = 0.01
    compute: Compute = Compute.FLOAT32
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse windows that do not move on.

        Raises:
            UsageError: The overlap is as large as the window.
        """
        if self.window < 1 or not 0 <= self.overlap < self.window:
            message = f"windows of {self.window} blocks cannot overlap by {self.overlap}"
            hint = "choose an overlap from 0 to the window less one"
            raise UsageError(message, hint=hint)


PRESETS: Final[Mapping[Preset, BlockReconstruction]] = {
    Preset.FAST: BlockReconstruction(learned=Learned.STEP_SIZES, steps=32),
    Preset.DEFAULT: BlockReconstruction(),
    Preset.BEST: BlockReconstruction(steps=288),
}
