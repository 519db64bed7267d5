"""What everything that is learned has in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from math import log
from typing import Final

import torch
from torch import Tensor

LEAST_FACTOR: Final = log(0.75)
"""Of step sizes that integer kernels add biases in: half of 32 bits is left (`ir.biases`), and
data and weight may both become finer."""


class Trained(ABC):
    """Numbers that are learned."""

    @abstractmethod
    def parameters(self) -> Sequence[Tensor]:
        """Return all that is learned."""

    @abstractmethod
    def confine(self) -> None:
        """Put back what a step of the optimizer took beyond what can be written."""

    def state(self) -> list[Tensor]:
        """Return copies of all that is learned, on the CPU."""
        return [each.detach().to("cpu", copy=True) for each in self.parameters()]

    def restore(self, state: Iterable[Tensor]) -> None:
        """Take what `state` returned."""
        with torch.no_grad():
            for own, saved in zip(self.parameters(), state, strict=True):
                own.copy_(saved)
