"""ONNX graphs as differentiable PyTorch programs (extra `torch`)."""

from importlib.util import find_spec

from qcompiler.errors import UsageError

if find_spec("torch") is None:
    _MESSAGE = "running a graph in PyTorch needs PyTorch"
    raise UsageError(_MESSAGE, hint="pip install 'qcompiler[torch]'")

from qcompiler.execution.torch.program import Program

__all__ = ["Program"]
