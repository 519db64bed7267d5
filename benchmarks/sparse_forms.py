"""Forms of a product with a few 16-bit weights beside int4 ones: time, and what is made dense.

    python -m benchmarks.sparse_forms [--size 2048] [--fraction 0.0035]

Each form is timed in turns with the float32 product of the same size, with one row and with 64, on
one thread. A form that ONNX Runtime does not load is listed with its reason. Prints a table.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from benchmarks.latency import in_turns
from benchmarks.markdown_table import table
from benchmarks.runtime import Array

_BLOCK: Final = 64
_ROWS: Final = (1, 64)
_INT4: Final = "wd = DequantizeLinear<axis=0, block_size=64>(w, s) p = MatMul(x, wd)"
_CAST: Final = "r = Cast<to=6>(rows) c = Cast<to=7>(cols) f = Cast<to=1>(v)"


@dataclass(frozen=True, slots=True)
class Form:
    """A graph for one product.

    Attributes:
        nodes: ONNX text; `x` is the data, `w` and `s` the int4 weight, `y` the result.
        weights: Further initializers.
        sparse: Initializers that the model holds as sparse tensors.
    """

    nodes: str
    weights: Mapping[str, Array] = field(default_factory=dict)
    sparse: Mapping[str, Array] = field(default_factory=dict)


def forms(size: int, fraction: float) -> Iterator[tuple[str, Form]]:
    """Yield every form by name, for a square weight."""
    generator = np.random.default_rng(0)
    count = int(fraction * size * size)
    cols, rows = np.divmod(np.sort(generator.choice(size * size, count, replace=False)), size)
    values = generator.standard_normal(count).astype(np.float16)
    dense = np.zeros((size, size), np.float32)
    dense[rows, cols] = values
    yield "int4 alone", Form(_INT4.replace("p = ", "y = "))
    channels = max(1, int(fraction * size))
    yield (
        "column island",
        Form(
            f"{_INT4} f = Cast<to=1>(v) g = Gather<axis=1>(x, i) q = MatMul(g, f) y = Add(p, q)",
            {
                "v": generator.standard_normal((channels, size)).astype(np.float16),
                "i": np.sort(generator.choice(size, channels, replace=False)).astype(np.int32),
            },
        ),
    )
    yield (
        "column island, channels permuted so that they lie side by side",
        Form(
            f"{_INT4} f = Cast<to=1>(v) g = Slice(x, from, to, axis) q = MatMul(g, f) "
            "y = Add(p, q)",
            {
                "v": generator.standard_normal((channels, size)).astype(np.float16),
                "from": np.array([0], np.int64),
                "to": np.array([channels], np.int64),
                "axis": np.array([1], np.int64),
            },
        ),
    )
    places = {
        "rows": rows.astype(np.uint16),
        "cols": cols.astype(np.uint16)[:, np.newaxis],
        "v": values[:, np.newaxis],
    }
    yield (
        "Gather, Mul, ScatterND add",
        Form(
            f"{_INT4} {_CAST} xt = Transpose(x) g = Gather(xt, r) m = Mul(g, f) pt = Transpose(p) "
            'yt = ScatterND<reduction="add">(pt, c, m) y = Transpose(yt)',
            places,
        ),
    )
    yield (
        "sparse initializer, MatMul",
        Form(f"{_INT4} q = MatMul(x, d) y = Add(p, q)", sparse={"d": dense}),
    )
    yield (
        "scatter into zeros, MatMul",
        Form(
            f"{_INT4} c = Cast<to=7>(at) f = Cast<to=1>(v) z = ConstantOfShape(shape) "
            "d = ScatterND(z, c, f) q = MatMul(x, d) y = Add(p, q)",
            {
                "at": np.stack([rows, cols], axis=1).astype(np.uint16),
                "v": values,
                "shape": np.array([size, size], np.int64),
            },
        ),
    )
    yield "padded rows, Mul, ReduceSum", _padded(rows, cols, values, size)
    yield (
        "SparseToDenseMatMul",
        Form(
            f"{_INT4} xt = Transpose(x) qt = com.microsoft.SparseToDenseMatMul(dt, xt) "
            "q = Transpose(qt) y = Add(p, q)",
            sparse={"dt": np.ascontiguousarray(dense.T)},
        ),
    )


def _padded(rows: Array, cols: Array, values: Array, size: int) -> Form:
    """Return the form that gives every output channel as many places as the fullest has."""
    most = int(np.bincount(cols, minlength=size).max())
    index, padded = np.zeros((size, most), np.uint16), np.zeros((size, most), np.float16)
    place = np.arange(len(cols)) - np.searchsorted(cols, cols)
    index[cols, place], padded[cols, place] = rows, values
    return Form(
        f"{_INT4} r = Cast<to=6>(at) f = Cast<to=1>(v) g = Gather<axis=1>(x, r) m = Mul(g, f) "
        "q = ReduceSum<keepdims=0>(m, last) y = Add(p, q)",
        {"at": index, "v": padded, "last": np.array([-1], np.int64)},
    )


def open_form(form: Form, size: int) -> ort.InferenceSession:
    """Load a form in ONNX Runtime, on one thread.

    Raises:
        Exception: ONNX Runtime does not load it.
    """
    header = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
    text = f"{header} g (float[m, {size}] x) => (float[m, {size}] y) {{ {form.nodes} }}"
    model = onnx.parser.parse_model(text)
    codes = np.random.default_rng(1).integers(-8, 8, (size, size)).astype(ml_dtypes.int4)
    scales = np.full((size // _BLOCK, size), 0.02, np.float32)
    for name, array in {"w": codes, "s": scales, **form.weights}.items():
        if name in ("w", "s") and "DequantizeLinear" not in form.nodes:
            continue
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for name, array in form.sparse.items():
        at = np.flatnonzero(array)
        values = numpy_helper.from_array(array.reshape(-1)[at], name)
        places = numpy_helper.from_array(at.astype(np.int64), name)
        sparse = onnx.helper.make_sparse_tensor(values, places, array.shape)
        model.graph.sparse_initializer.append(sparse)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def measure(size: int, fraction: float) -> dict[str, dict[str, str]]:
    """Time every form; return cells by form and number of rows."""
    weight = np.random.default_rng(2).standard_normal((size, size)).astype(np.float32)
    truth = open_form(Form("y = MatMul(x, d)", {"d": weight}), size)
    found: dict[str, dict[str, str]] = {}
    for name, form in forms(size, fraction):
        try:
            session = open_form(form, size)
        except Exception as error:  # whatever the runtime says of it
            found[name] = {"note": str(error).splitlines()[0][:90]}
            continue
        found[name] = {}
        for rows in _ROWS:
            feeds: dict[str, Any] = {"x": np.ones((rows, size), np.float32)}
            times = in_turns(
                partial(truth.run, None, feeds), partial(session.run, None, feeds), seconds=1.0
            )
            cell = f"{times['milliseconds']:.2f} ms, {times['ratio']:.2f} of float"
            found[name][f"{rows} rows"] = cell
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--fraction", type=float, default=0.0035)
    chosen = parser.parse_args(arguments)
    print("\n".join(table(measure(chosen.size, chosen.fraction))))


if __name__ == "__main__":
    main()
