"""What became of a window of blocks that was reconstructed."""

from dataclasses import dataclass

from qcompiler.rewriting.base import Rewrite


@dataclass(frozen=True, slots=True)
class WindowRewrite(Rewrite):
    """One window, as reports show it; `node` is a label of its blocks.

    Attributes:
        window: Position, from 0.
        loss_before: Loss on calls held out, with the codes and step sizes it began with.
        loss_after: The same with those that were learned.
        kept: Whether what was learned was kept: it was better.
        codes: Codes of all its weights.
        flipped: How many of them are not what they were at the start of the pass.
        seconds: Wall time.
        peak_bytes: Peak memory of the device, of the process on a CPU.
    """

    window: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0
    kept: bool = True
    codes: int = 0
    flipped: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
