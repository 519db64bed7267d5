"""ONNX graphs as differentiable PyTorch programs (extra `torch`)."""

from qcompiler.execution.torch.program import Program

__all__ = ["Program"]
