"""How much memory exporting a PyTorch module and saving the graph takes, in parts of its weights.

    python benchmarks/export_memory.py --size 0.5

The module is a stack of feed-forward blocks with an embedding that the output layer shares, in
float32. Each row is a process of its own; what it held before the module was made counts on
neither side. "Resident" is the high-water mark; "needed" is without pages of mapped files, sampled
every 5 ms: ONNX Runtime maps the saved weights, and the system may drop such pages at any time.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

_RESULTS = Path(__file__).parent / "results"
_WIDTH = 1024
_STEPS = ("module", "export and save", "export, save and compare")
_ALLOWED = 1.3


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=0.5, help="gigabytes of weights")
    parser.add_argument("--step", choices=_STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(_measure(arguments.size, arguments.step)))
        return
    rows = [_in_a_process(arguments.size, step) for step in _STEPS]
    for row in rows:
        print(
            f"{row['step']:26} {row['seconds']:6.1f} s  needed {row['needed']:5.2f} x the weights, "
            f"resident {row['resident']:5.2f}"
        )
    _RESULTS.mkdir(exist_ok=True)
    packages = ("qcompiler", "torch", "onnx-ir", "onnxscript", "onnxruntime")
    result = {
        "gigabytes": arguments.size,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in packages},
        "rows": rows,
    }
    path = _RESULTS / "export_memory.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if any(row["needed"] > _ALLOWED for row in rows):
        sys.exit(f"exporting takes more than {_ALLOWED} x the weights")


def _in_a_process(size: float, step: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--size", str(size), "--step", step]
    # Fixed thresholds give freed arrays back to the system, as long runs do.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(size: float, step: str) -> dict[str, Any]:
    _export(1e-4, _STEPS[-1])  # loads all libraries
    resident, needed = _status("VmRSS"), _status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the mark
    started = time.perf_counter()
    with _Sampler("RssAnon") as sampler:
        weights = _export(size, step)
    return {
        "step": step,
        "seconds": time.perf_counter() - started,
        "needed": (sampler.peak - needed) / weights,
        "resident": (_status("VmHWM") - resident) / weights,
    }


class _Sampler:
    """Follows a field of the process's status, and keeps its largest value."""

    def __init__(self, field: str) -> None:
        self.peak = 0
        self._field = field
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, _status(self._field))


def _export(size: float, step: str) -> int:
    """Do a step, and return the bytes of the module's weights."""
    import torch

    from qcompiler.export.from_torch import from_torch
    from qcompiler.export.parity import check_parity
    from qcompiler.ir.save import save_model
    from qcompiler.progress import SilentProgress

    module = _stack(size)
    example = (torch.arange(8).reshape(2, 4),)
    weights = sum(int(parameter.nbytes) for parameter in module.parameters())
    if step == _STEPS[0]:
        return weights
    model = from_torch(module, example, dynamic_shapes=({0: "batch", 1: "sequence"},))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path, progress=SilentProgress(), external_data=True)
        if step == _STEPS[2]:
            check_parity(module, model, [example], file=path)
    return weights


def _stack(size: float) -> "torch.nn.Module":
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.up_proj = nn.Linear(width, 4 * width)
            self.down_proj = nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            update: torch.Tensor = self.down_proj(torch.relu(self.up_proj(self.norm(x))))
            return x + update

    class Stack(nn.Module):
        def __init__(self, blocks: int, width: int) -> None:
            super().__init__()
            self.embed = nn.Embedding(16 * width, width)
            self.layers = nn.ModuleList([Block(width) for _ in range(blocks)])
            self.head = nn.Linear(width, 16 * width, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x: torch.Tensor = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
            logits: torch.Tensor = self.head(x)
            return logits

    width = _WIDTH if size > 0.01 else 16
    blocks = max(1, round((size * 1e9 / 4 - 16 * width**2) / (8 * width**2)))
    make: Callable[[int, int], nn.Module] = Stack
    return make(min(blocks, 2) if width < _WIDTH else blocks, width).eval()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
