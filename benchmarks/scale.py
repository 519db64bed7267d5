"""How long and how much memory a large model takes, against a floor measured in the same run.

    python benchmarks/scale.py --size 3.4
    python benchmarks/scale.py --size 14

The model is a chain of MatMuls with float32 weights in external data. The floor is what nobody
can avoid: reading the file once, plus rounding the weights to int4 in blocks of 128 with plain
whole-array NumPy (minimum and maximum, no search). Both start with the file out of the page
cache. The compilation does more than the floor: it searches for the clipping range of least
squared error, writes the result and loads it in ONNX Runtime.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

_BLOCK = 128
_CHUNK = 16 << 20
_RESULTS = Path(__file__).parent / "results"

Array = npt.NDArray[Any]


def layer_shapes(gigabytes: float) -> list[tuple[int, int]]:
    """Return the shapes of the MatMuls: 2,900 square up to 4 GB, Llama-7B's above."""
    total = gigabytes * 1e9 / 4
    if gigabytes <= 4:
        return [(2900, 2900)] * round(total / 2900**2)
    block = [(4096, 4096)] * 4 + [(4096, 14336), (14336, 4096), (4096, 4096)]
    return block * max(1, round(total / sum(k * n for k, n in block)))


def generate(folder: Path, gigabytes: float) -> Path:
    """Write the model, one weight at a time; an existing one is used again."""
    path = folder / f"chain-{gigabytes:g}gb.onnx"
    if path.exists():
        return path
    data = path.with_suffix(".onnx.data")
    generator = np.random.default_rng(0)
    nodes, weights, offset = [], [], 0
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 0]))
    shapes = layer_shapes(gigabytes)
    x.shape = ir.Shape(["n", shapes[0][0]])
    value = x
    with data.open("wb") as file:
        for index, (k, n) in enumerate(shapes):
            array = generator.standard_normal((k, n), dtype=np.float32)
            array *= 0.02
            file.write(array.data)
            weights.append(_external(f"w{index}", data, offset, (k, n)))
            offset += array.nbytes
            node = ir.Node("", "MatMul", [value, weights[-1]], name=f"layer{index}/MatMul")
            value = node.outputs[0]
            value.name = f"h{index}"
            nodes.append(node)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape(["n", shapes[-1][1]])
    graph = ir.Graph(
        [x], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="chain"
    )
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def _external(name: str, data: Path, offset: int, shape: tuple[int, int]) -> ir.Value:
    tensor = ir.ExternalTensor(
        data.name,
        offset,
        4 * shape[0] * shape[1],
        ir.DataType.FLOAT,
        shape=ir.Shape(shape),
        name=name,
        base_dir=data.parent,
    )
    return ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(shape),
        const_value=tensor,
    )


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget a file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(data: Path) -> float:
    """Read the file once, front to back."""
    drop_from_cache(data)
    started = time.perf_counter()
    buffer = bytearray(_CHUNK)
    with data.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def round_to_nearest(weight: Array) -> tuple[Array, Array]:
    """Round a weight [K, N] to int4 in blocks along K, packed; plain whole-array NumPy."""
    padded = np.pad(weight, ((0, -weight.shape[0] % _BLOCK), (0, 0)))
    blocks = padded.reshape(-1, _BLOCK, weight.shape[1])
    scale = np.maximum(np.abs(blocks).max(axis=1, keepdims=True) / 7, 1e-30)
    codes = np.clip(np.rint(blocks / scale), -8, 7).astype(np.int8)
    flat = codes.reshape(-1)[: weight.size] & 15
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8), scale[:, 0]


def numpy_seconds(data: Path, shapes: list[tuple[int, int]], threads: int) -> float:
    """Time the rounding of all weights; reading them is not counted."""

    def weights() -> Iterator[Array]:
        with data.open("rb") as file:
            for k, n in shapes:
                yield np.fromfile(file, np.float32, k * n).reshape(k, n)

    spent = 0.0
    with ThreadPoolExecutor(threads) as pool:
        batch: list[Array] = []
        for weight in weights():
            batch.append(weight)
            if len(batch) == threads:
                started = time.perf_counter()
                list(pool.map(round_to_nearest, batch))
                spent += time.perf_counter() - started
                batch = []
        if batch:
            started = time.perf_counter()
            list(pool.map(round_to_nearest, batch))
            spent += time.perf_counter() - started
    return spent


def compile_once(model: Path, output: Path, scheme: str) -> dict[str, float]:
    """Run the command as a user does; wall seconds, and peak memory as the process reports it."""
    drop_from_cache(model.with_suffix(".onnx.data"))
    command = [sys.executable, "-m", "qcompiler.cli", str(model), "-o", str(output)]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--scheme", scheme, "--report", "json"], check=True, stdout=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - started
    report = json.loads(output.with_suffix(".report.json").read_text())
    return {
        "compile_seconds": seconds,
        "peak_rss_gib": report["summary"]["peak_memory_bytes"] / 2**30,
        "output_gb": report["output"]["bytes"] / 1e9,
        "integer_kernels": report["summary"]["integer_kernels"],
        "sites": report["summary"]["sites"],
        "worst_sqnr_db": report["summary"]["worst_sqnr_db"],
    }


def main() -> None:
    """Generate, measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=float, default=3.4, help="gigabytes of float32 weights")
    parser.add_argument("--scheme", default="w4a16:b128")
    parser.add_argument(
        "--folder", type=Path, help="where the model goes; a temporary one if absent"
    )
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qcompiler-scale-") as scratch:
        folder = arguments.folder or Path(scratch)
        model = generate(folder, arguments.size)
        data = model.with_suffix(".onnx.data")
        shapes = layer_shapes(arguments.size)
        threads = os.cpu_count() or 1
        rows = []
        for _ in range(arguments.runs):
            row = {"read_seconds": read_seconds(data)}
            row["numpy_seconds_one_thread"] = numpy_seconds(data, shapes, 1)
            row["numpy_seconds_all_threads"] = numpy_seconds(data, shapes, threads)
            row |= compile_once(model, Path(scratch) / "out.onnx", arguments.scheme)
            floor = row["read_seconds"] + row["numpy_seconds_one_thread"]
            row["ratio_to_floor"] = row["compile_seconds"] / floor
            best = row["read_seconds"] + row["numpy_seconds_all_threads"]
            row["ratio_to_threaded_floor"] = row["compile_seconds"] / best
            rows.append(row)
            print("  ".join(f"{name}={value:.3g}" for name, value in row.items()), flush=True)
        _write(arguments, data.stat().st_size, rows)


def _write(arguments: argparse.Namespace, size: int, rows: list[dict[str, float]]) -> None:
    _RESULTS.mkdir(exist_ok=True)
    content = {
        "command": f"python benchmarks/scale.py --size {arguments.size:g}",
        "scheme": arguments.scheme,
        "weight_bytes": size,
        "machine": {"processors": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("qcompiler", "numpy", "onnxruntime")},
        "runs": rows,
    }
    path = _RESULTS / f"scale-{arguments.size:g}gb.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
