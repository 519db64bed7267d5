"""How large a model is on disk."""

from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.tensor_sites import tensor_sites


def stored_bytes(path: Path, model: ir.Model) -> int:
    """Return the bytes of a model's file and of its external data.

    Args:
        path: The file.
        model: What was loaded from it, and not changed.
    """
    tensors = (site.tensor for site in tensor_sites(model))
    files = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return path.stat().st_size + sum(file.stat().st_size for file in files)
