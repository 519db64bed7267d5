"""What the gradients of a task cost: seconds and memory, next to running the model forwards.

    python -m benchmarks.gradient_cost --shape smollm2 --calls 8 --tokens 512
    python -m benchmarks.gradient_cost --shape 7b --device cuda --calls 16

Both go block by block, over the same calls, in float32, in turns; the loss is the mean square of
the outputs, which costs nothing beside them. Memory on the CPU is the process's, over what it was
before; on a GPU it is PyTorch's. The shapes of LLaMA are those of `benchmarks.llama_windows`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from benchmarks.arguments import add_places, benchmark_parser
from benchmarks.int8_workloads import INT8_WORKLOADS
from benchmarks.llama_windows import SHAPES, make_samples, write_model
from benchmarks.results_file import write_facts
from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.task_calls import Task, TaskCall, TaskKind
from qcompiler.ir.load import load_model
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions
from qcompiler.pipeline import pipeline, quantizing_passes
from qcompiler.plan import make_plan
from qcompiler.progress import SilentProgress
from qcompiler.reconstruction.block_stream import BlockStream, open_device
from qcompiler.reconstruction.gradients import GradientRun, sum_gradients
from qcompiler.reconstruction.island_scores import leaves_of
from qcompiler.reconstruction.starting_point import StartingPoint, quantize_to_start
from qcompiler.reconstruction.tensor_files import TensorFiles
from qcompiler.reconstruction.value_cache import ValueCache
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager

_SMOLLM2: Final = "smollm2"


def _source(arguments: argparse.Namespace, folder: Path) -> tuple[Path, Samples, tuple[str, ...]]:
    """Return a model, calls for it, and what in it stays in float."""
    if arguments.shape == _SMOLLM2:
        workload = INT8_WORKLOADS["smollm2_folded"]

        def read() -> Iterator[Feeds]:
            for feeds in islice(workload.samples(), arguments.calls):
                yield {name: each[:, : arguments.tokens] for name, each in feeds.items()}

        return workload.task.build(), Samples("texts", True, arguments.calls, read), ()
    width = SHAPES[arguments.shape][0]
    path, _ = write_model(folder, arguments.shape)
    return path, make_samples(width, arguments.calls, arguments.tokens), ("before",)


def _task(samples: Samples) -> Task:
    def read() -> Iterator[TaskCall]:
        return (TaskCall(feeds, None) for feeds in samples)

    def loss(outputs: dict[str, torch.Tensor], _: object) -> torch.Tensor:
        return torch.stack([value.square().mean() for value in outputs.values()]).sum()

    return Task(TaskKind.FUNCTION, "mean square", samples.count, read, loss)


def run_forwards(start: StartingPoint, samples: Samples, run: GradientRun, folder: Path) -> None:
    """Run the model block by block on all calls."""
    outputs = [value.name or "" for value in start.original.graph.outputs]
    with ValueCache(folder, run.memory) as cache:
        stream = BlockStream(start.original, start.blocks, cache, open_device(run.device))
        stream.read(samples)
        for _ in start.blocks[:-1]:
            stream.advance()
        for _ in stream.values(outputs):
            pass


def find_gradients(start: StartingPoint, samples: Samples, run: GradientRun, folder: Path) -> None:
    """Sum the gradients by all weights that would be codes."""
    leaves = leaves_of(start, start.weights, at_codes=False)
    with TensorFiles(folder) as files:
        sum_gradients(
            *(start.original, start.blocks, leaves, _task(samples), start.original),
            *(run, files, SilentProgress()),
        )


def _timed(device: str, work: Callable[[], None]) -> tuple[float, int]:
    """Return the seconds of some work, and what it took of memory at most."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = 0 if cuda else _resident("VmRSS")
    if not cuda:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    begin = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated(device) if cuda else _resident("VmHWM")
    return seconds, peak - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    message = f"this system does not tell {field}"
    raise RuntimeError(message)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time both, in turns."""
    run = GradientRun(arguments.device, arguments.memory << 30)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        path, samples, exclude = _source(arguments, folder)
        plan = make_plan(CompileOptions(scheme=arguments.scheme, exclude=exclude))
        inserting = tuple(quantizing_passes(plan))
        inserted = {each.name for each in inserting}
        model = load_model(path)
        (folder / "store").mkdir()
        with WeightStore(folder / "store") as store:
            context = PassContext(store, SilentProgress(), arguments.workers)
            before = takewhile(lambda each: each.name not in inserted, pipeline(plan))
            PassManager(context).run(model, list(before))
            start = quantize_to_start(model, inserting, context)
            works = {"forwards": run_forwards, "gradients": find_gradients}
            found: dict[str, list[tuple[float, int]]] = {what: [] for what in works}
            for turn in range(arguments.turns + 1):
                for what, work in works.items():
                    taken = _timed(arguments.device, partial(work, start, samples, run, folder))
                    print(f"{what}: {taken[0]:.2f} s, {taken[1] / 2**30:.2f} GiB", flush=True)
                    if turn:
                        found[what].append(taken)
            weights = sum(each.rows.shape[0] * each.rows.shape[1] for each in start.weights)
    seconds = {what: median(each[0] for each in turns) for what, turns in found.items()}
    return {
        "shape": arguments.shape,
        "device": arguments.device,
        "calls": arguments.calls,
        "tokens": arguments.tokens,
        "blocks": len(start.blocks),
        "weights": weights,
        "seconds": seconds,
        "ratio": seconds["gradients"] / seconds["forwards"],
        "peak_gib": {what: max(e[1] for e in turns) / 2**30 for what, turns in found.items()},
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shape", choices=[_SMOLLM2, *SHAPES], default=_SMOLLM2)
    parser.add_argument("--scheme", default="w2a16:b64", help="Its weights are differentiated by.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="Of a call, at most.")
    parser.add_argument("--turns", type=int, default=3, help="Timed ones; one more comes first.")
    parser.add_argument("--memory", type=int, default=2, help="GiB of values between blocks.")
    parser.add_argument("--workers", type=int, default=2)
    add_places(parser)
    arguments = parser.parse_args()
    write_facts(measure(arguments), arguments.json)


if __name__ == "__main__":
    main()
