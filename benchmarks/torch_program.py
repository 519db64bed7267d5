"""What running an ONNX graph in PyTorch costs, next to the module it was exported from.

    python -m benchmarks.torch_program                             SmolLM2 on the CPU
    python -m benchmarks.torch_program --random --device cuda --dtype bfloat16 --batch 8

Times SmolLM2 as a `Program` and as the transformers module (its eager and its fused attention) in
alternation: forward, and forward with the gradients of all weights. Peak memory is that of a
process of its own on the CPU, of PyTorch's allocator on CUDA. Without `--random` the perplexity
by Program is compared with that by ONNX Runtime.

`--random` takes weights of the same shapes from a seed, where the checkpoint cannot be had.
Results go to benchmarks/results/torch_program-DEVICE-DTYPE-bBATCH.json.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.latency import in_turns
from benchmarks.measured_process import run_measured
from benchmarks.models import smollm2
from benchmarks.models.smollm2_checkpoint import load_config
from benchmarks.models.torch_export import export
from benchmarks.results_file import FOLDER, machine, versions
from qcompiler.execution.torch import Program
from qcompiler.ir.load import load_model

_SEED = 0
_ROOT = Path(__file__).parent.parent
_MEMORY_LIMIT = 20 << 30
_TIME_LIMIT = 600

Tensors = dict[str, torch.Tensor]


def module_of(settings: argparse.Namespace, attention: str) -> LlamaForCausalLM:
    """Return SmolLM2 as transformers runs it, with random or released weights."""
    if settings.random:
        torch.manual_seed(_SEED)
        config = LlamaConfig(**load_config(), attn_implementation=attention)
        module = LlamaForCausalLM(config).eval()
    else:
        module = smollm2.module("raw", attention)
    return module.to(settings.device, settings.dtype)


def model_path(settings: argparse.Namespace, folder: Path) -> Path:
    """Return the exported graph."""
    if not settings.random:
        return smollm2.build("raw")
    path = folder / "random.onnx"
    torch.manual_seed(_SEED)
    module = LlamaForCausalLM(LlamaConfig(**load_config())).eval()
    inputs = ("input_ids", "attention_mask")
    limits = {"max_sequence": module.config.max_position_embeddings}
    export(
        module, path, inputs=inputs, output="logits", external_data=True, use_cache=False, **limits
    )
    return path


def program_of(settings: argparse.Namespace, path: Path) -> Program:
    """Return the graph as a program."""
    return Program.from_subgraph(load_model(path), device=settings.device, dtype=settings.dtype)


def feeds_of(settings: argparse.Namespace) -> Tensors:
    """Return token ids from a seed."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = (settings.batch, settings.tokens)
    ids = torch.randint(0, load_config()["vocab_size"], shape, generator=generator)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: tensor.to(settings.device) for name, tensor in feeds.items()}


def run_module(
    module: LlamaForCausalLM, feeds: Tensors, *, gradients: bool
) -> Callable[[], object]:
    """Return a function that runs the module once."""
    weights = list(module.parameters())

    def forward() -> Any:
        return module(**feeds, use_cache=False).logits

    return _once(forward, weights, gradients)


def run_program(program: Program, feeds: Tensors, *, gradients: bool) -> Callable[[], object]:
    """Return a function that runs the program once."""
    weights: Mapping[str, torch.Tensor] = {}
    if gradients:
        loaded = {name: program.weight(name) for name in program.weight_names}
        weights = {
            name: tensor.detach().requires_grad_()
            for name, tensor in loaded.items()
            if tensor.is_floating_point() and tensor.dim() > 0
        }

    def forward() -> Any:
        return program(feeds, weights=weights)["logits"]

    return _once(forward, list(weights.values()), gradients)


def _once(
    forward: Callable[[], Any], weights: list[torch.Tensor], gradients: bool
) -> Callable[[], object]:
    def run() -> object:
        with torch.set_grad_enabled(gradients):
            logits = forward()
            result = logits
            if gradients:
                loss = logits.float().logsumexp(-1).mean()
                result = torch.autograd.grad(loss, weights, allow_unused=True)
        if logits.is_cuda:
            torch.cuda.synchronize()
        return result

    return run


def time_all(settings: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Return ratios of the program's times to the module's, by attention and direction."""
    feeds = feeds_of(settings)
    found: dict[str, Any] = {}
    for attention in ("eager", "sdpa"):
        module = module_of(settings, attention)
        program = program_of(settings, path)
        for gradients in (False, True):
            name = f"{attention}, {'forward and backward' if gradients else 'forward'}"
            found[name] = in_turns(
                run_module(module, feeds, gradients=gradients),
                run_program(program, feeds, gradients=gradients),
                settings.seconds,
                settings.rounds,
            )
            print(f"{name:32} {_timing(found[name])}", flush=True)
        found[f"{attention}, difference"] = difference(module, program, feeds)
    return found


def difference(module: LlamaForCausalLM, program: Program, feeds: Tensors) -> float:
    """Return the largest difference of the logits, relative to the largest logit."""
    with torch.no_grad():
        expected = module(**feeds, use_cache=False).logits.float()
        return float((program(feeds)["logits"] - expected).abs().max() / expected.abs().max())


def _timing(timing: Mapping[str, float]) -> str:
    low, high = timing["ratio_low"], timing["ratio_high"]
    times = f"{timing['float_milliseconds']:.1f} -> {timing['milliseconds']:.1f} ms"
    return f"{timing['ratio']:.2f} ({low:.2f}-{high:.2f})  {times}"


def peak_memory(settings: argparse.Namespace, path: Path) -> dict[str, int]:
    """Return the peak bytes of a forward run, by what runs."""
    if settings.device != "cpu":
        return {kind: _cuda_peak(settings, path, kind) for kind in ("sdpa", "program")}
    command = [sys.executable, "-m", "benchmarks.torch_program", *sys.argv[1:]]
    command += ["--graph", str(path)]
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    found = {}
    for kind in ("nothing", "sdpa", "program"):
        outcome = run_measured(
            [*command, "--only", kind],
            environment,
            folder=_ROOT,
            memory_limit=_MEMORY_LIMIT,
            time_limit=_TIME_LIMIT,
        )
        if outcome.returncode:
            raise RuntimeError(outcome.last_complaint)
        found[kind] = outcome.peak_bytes
    return found


def _cuda_peak(settings: argparse.Namespace, path: Path, kind: str) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run_once(settings, path, kind)
    return torch.cuda.max_memory_allocated()


def run_once(settings: argparse.Namespace, path: Path, kind: str) -> None:
    """Run one of them once, forward."""
    feeds = feeds_of(settings)
    if kind == "program":
        run_program(program_of(settings, path), feeds, gradients=False)()
    elif kind != "nothing":
        run_module(module_of(settings, kind), feeds, gradients=False)()


class _AsSession:
    """A program with the one method of an ONNX Runtime session that scoring calls."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        with torch.no_grad():
            result = self.program(feeds)
        return [np.asarray(result[name].float().cpu()) for name in names]


def perplexities(settings: argparse.Namespace, path: Path) -> dict[str, float]:
    """Return the perplexity by both executors."""
    session: Any = _AsSession(program_of(settings, path))
    return {
        "program": smollm2.evaluate(lambda: session, settings.windows)["perplexity"],
        "onnxruntime": smollm2.evaluate(path, settings.windows)["perplexity"],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--random", action="store_true", help="weights from a seed")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each timing")
    parser.add_argument("--rounds", type=int, default=7, help="at least, for each timing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=smollm2.QUICK_WINDOWS, help="of perplexity")
    parser.add_argument("--results", type=Path, default=FOLDER)
    kinds = ["nothing", "eager", "sdpa", "program"]
    parser.add_argument("--only", choices=kinds, help=argparse.SUPPRESS)
    parser.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure, print, and write JSON."""
    settings = _parser().parse_args()
    torch.set_num_threads(settings.threads)
    if settings.only:
        run_once(settings, settings.graph, settings.only)
        return
    with tempfile.TemporaryDirectory(prefix="qcompiler-program-") as folder:
        path = settings.graph or model_path(settings, Path(folder))
        content: dict[str, Any] = {
            "machine": machine(),
            "versions": versions(),
            "settings": {
                name: str(value)
                for name, value in vars(settings).items()
                if name not in ("graph", "only", "results")
            },
            "timing": time_all(settings, path),
            "peak_bytes": peak_memory(settings, path),
        }
        if settings.device != "cpu":
            content["machine"]["gpu"] = torch.cuda.get_device_name()
        if not settings.random:
            content["perplexity"] = perplexities(settings, path)
    settings.results.mkdir(exist_ok=True)
    kind = f"{torch.device(settings.device).type}-{settings.dtype}".replace("torch.", "")
    output = settings.results / f"torch_program-{kind}-b{settings.batch}.json"
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: content[key] for key in ("peak_bytes", "perplexity") if key in content}))


if __name__ == "__main__":
    main()
