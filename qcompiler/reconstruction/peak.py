"""How much memory of a device was taken at most."""

import torch

from qcompiler.execution.process_memory import peak_memory


def forget_peak(device: torch.device) -> None:
    """Begin to measure; on a CPU the process's peak cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_of(device: torch.device) -> int:
    """Return the most bytes that were allocated on a device since; the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
