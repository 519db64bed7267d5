"""Choosing codes by what they do to the outputs of ops and blocks, in PyTorch (extra `torch`)."""

from importlib.util import find_spec

from qcompiler.errors import UsageError

if find_spec("torch") is None:
    _MESSAGE = "choosing codes by what they do to outputs needs PyTorch"
    raise UsageError(_MESSAGE, hint="pip install 'qcompiler[torch]'")
