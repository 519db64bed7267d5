"""What a window of a large decoder takes to reconstruct: seconds, arithmetic, memory.

    python -m benchmarks.llama_windows --shape 7b --device cuda
    python -m benchmarks.llama_windows --shape 65b --device cuda --calls 128

Three layers of LLaMA's shape make two windows of two, which share one, as in the whole model: RMS
norms, causal attention, a gated unit, random weights in float16, without rotary positions; a float
product stands before them. Codes start from the nearest ones; what is learned, and in how many
steps, is the preset's. Hours for the whole model are the seconds of the first window and, for all
others, those of the second: the start (GPTQ) and reading the model come on top. TFLOP/s count two
operations for each weight and token of a forward run and four of a backward one, none of attention.
"""

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from benchmarks.arguments import add_places, benchmark_parser
from benchmarks.results_file import write_facts
from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.ir.load import load_model
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions
from qcompiler.passes.reconstruct.reconstruct_blocks import (
    ReconstructBlocks,
    ReconstructBlocksOptions,
)
from qcompiler.pipeline import pipeline, quantizing_passes
from qcompiler.plan import make_plan
from qcompiler.progress import SilentProgress
from qcompiler.quant.reconstruction import PRESETS, Compute, Preset, Start
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager
from qcompiler.rewriting.window_record import WindowRewrite

SHAPES: Final = {
    "tiny": (64, 176, 4, 4),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "65b": (8192, 22016, 64, 80),
}
"""Channels, channels of the gated unit, heads, and layers of the whole model."""
_LAYERS: Final = 3
_CHUNK: Final = 1 << 24
_SHIFTS: Final = 7919

Array = npt.NDArray[Any]


def layer_text(layer: int, heads: int) -> str:
    """Return one layer as ONNX text, from `h{layer}` to `h{layer + 1}`."""
    at = layer
    return f"""
        a{at} = RMSNormalization<epsilon=1e-5>(h{at}, norm)
        [q{at}] q_{at} = MatMul(a{at}, wq{at}) [k{at}] k_{at} = MatMul(a{at}, wk{at})
        [v{at}] v_{at} = MatMul(a{at}, wv{at})
        c{at} = Attention<is_causal=1, q_num_heads={heads}, kv_num_heads={heads}>
            (q_{at}, k_{at}, v_{at})
        [o{at}] b{at} = MatMul(c{at}, wo{at}) r{at} = Add(h{at}, b{at})
        n{at} = RMSNormalization<epsilon=1e-5>(r{at}, norm)
        [gate{at}] g{at} = MatMul(n{at}, wgate{at}) [up{at}] u{at} = MatMul(n{at}, wup{at})
        s{at} = Sigmoid(g{at}) i{at} = Mul(g{at}, s{at}) j{at} = Mul(i{at}, u{at})
        [down{at}] d{at} = MatMul(j{at}, wdown{at}) h{at + 1} = Add(r{at}, d{at})"""


def write_model(folder: Path, shape: str) -> tuple[Path, int]:
    """Write the layers with weights in external data; return the path and how many weights."""
    width, inner, heads, _ = SHAPES[shape]
    products = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
    products |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    sizes = {"before": (width, width)}
    sizes |= {f"w{name}{at}": size for at in range(_LAYERS) for name, size in products.items()}
    body = "".join(layer_text(layer, heads) for layer in range(_LAYERS))
    declared = "".join(
        f", float16[{rows}, {columns}] {name}" for name, (rows, columns) in sizes.items()
    )
    model = ir.from_onnx_text(
        f"""<ir_version: 11, opset_import: ["" : 23]>
        g (float16[B, T, {width}] x, float16[{width}] norm{declared})
        => (float16[B, T, {width}] h{_LAYERS}) {{ [before] h0 = MatMul(x, before) {body} }}"""
    )
    _, norm, *values = model.graph.inputs
    norm.const_value = ir.tensor(np.ones(width, np.float16), name="norm")
    data = folder / "layers.onnx.data"
    offset = 0
    with data.open("wb") as file:
        for value, size in zip(values, sizes.values(), strict=True):
            value.const_value = ir.ExternalTensor(
                *(data.name, offset, 2 * math.prod(size), ir.DataType.FLOAT16),
                shape=ir.Shape(size),
                name=value.name or "",
                base_dir=folder,
            )
            for part in _random_numbers(math.prod(size), size[0] ** -0.5, offset):
                offset += file.write(part.tobytes())
    for value in (norm, *values):
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    path = folder / "layers.onnx"
    ir.save(model, path)
    return path, offset // 2 - width * width


def _random_numbers(count: int, scale: float, seed: int) -> Iterator[Array]:
    """Yield `count` numbers from a finite lot, each time from another place."""
    numbers = np.random.default_rng(seed).standard_normal(_CHUNK + _SHIFTS, dtype=np.float32)
    numbers = (numbers * np.float32(scale)).astype(np.float16)
    for index, start in enumerate(range(0, count, _CHUNK)):
        shift = index * 1009 % _SHIFTS
        yield numbers[shift : shift + min(_CHUNK, count - start)]


def make_samples(width: int, calls: int, tokens: int) -> Samples:
    """Return calls of random hidden states."""
    parts = list(_random_numbers(tokens * width, 1.0, 1))
    numbers = np.concatenate(parts).reshape(1, tokens, width)

    def read() -> Iterator[Feeds]:
        for index in range(calls):
            yield {"x": np.roll(numbers, index * 13, axis=2)}

    return Samples("random hidden states", True, calls, read)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Reconstruct one window; return what it took."""
    width, _, _, layers = SHAPES[arguments.shape]
    how = replace(
        PRESETS[Preset(arguments.preset)],
        start=Start.NEAREST,
        compute=Compute(arguments.compute),
        **({} if arguments.steps is None else {"steps": arguments.steps}),
    )
    plan = make_plan(CompileOptions(scheme=arguments.scheme, exclude=("before",)))
    samples = make_samples(width, arguments.calls, arguments.tokens)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        begin = time.perf_counter()
        path, weights = write_model(folder, arguments.shape)
        made = time.perf_counter()
        print(f"{weights / 1e9:.2f} billion weights written in {made - begin:.1f} s", flush=True)
        model = load_model(path)
        inserting = tuple(quantizing_passes(plan))
        inserted = {each.name for each in inserting}
        before = itertools.takewhile(lambda each: each.name not in inserted, pipeline(plan))
        (folder / "store").mkdir()
        with WeightStore(folder / "store") as store:
            context = PassContext(store, SilentProgress(), arguments.workers)
            reconstruct = ReconstructBlocks(
                ReconstructBlocksOptions(
                    *(samples, inserting, how, arguments.device, arguments.memory << 30)
                )
            )
            records = PassManager(context).run(model, [*before, reconstruct])
    whole = time.perf_counter() - made
    first, later = (
        r for record in records for r in record.rewrites if isinstance(r, WindowRewrite)
    )
    # In each window a layer's values for all calls, in both models, and of both layers the loss of
    # one call in eight before and after.
    runs = arguments.calls + 2 * max(1, arguments.calls // 8)
    work = later.codes * arguments.tokens * (2.0 * runs + 6.0 * how.steps * how.batch)
    return {
        "shape": arguments.shape,
        "scheme": arguments.scheme,
        "device": arguments.device,
        "compute": arguments.compute,
        "calls": arguments.calls,
        "tokens": arguments.tokens,
        "steps": how.steps,
        "weights": later.codes,
        "seconds_first": first.seconds,
        "seconds": later.seconds,
        "seconds_with_start": whole,
        "tflops": work / later.seconds / 1e12,
        "peak_gib": max(first.peak_bytes, later.peak_bytes) / (1 << 30),
        "loss": [later.loss_before, later.loss_after],
        "hours_for_all_windows": (first.seconds + later.seconds * (layers - 2)) / 3600,
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--scheme", default="w2a16:b64")
    parser.add_argument("--preset", choices=[each.value for each in Preset], default="default")
    parser.add_argument("--compute", choices=[each.value for each in Compute], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, help="Steps of a window, in place of the preset's.")
    parser.add_argument("--memory", type=int, default=64, help="GiB the process may take.")
    parser.add_argument("--workers", type=int, default=16)
    add_places(parser)
    arguments = parser.parse_args()
    write_facts(measure(arguments), arguments.json)


if __name__ == "__main__":
    main()
