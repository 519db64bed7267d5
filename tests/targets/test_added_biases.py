"""Where ONNX Runtime's kernels take the constant that is added behind a MatMul."""

from pathlib import Path

import numpy as np
import pytest

from qcompiler import CalibrationOptions, CompileOptions, compile_model
from qcompiler.quant.scheme import Activations, parse_scheme
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from tests.support.calibrated import run_optimized
from tests.support.graphs import build, random_array

SHAPES = {"matrix": "n, 64", "fixed": "2, 5, 64", "free": "n, t, 64"}
SCHEMES = ("w8a16", "w4a16:b32", "w2a16:b64", "w8a8-dynamic", "w8a8")


@pytest.mark.parametrize("behind", ["Softmax", "Relu"])
@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", SCHEMES)
def test_the_add_goes_where_the_table_says(
    text: str, shape: str, kind: str, behind: str, tmp_path: Path
) -> None:
    scheme = parse_scheme(text)
    assert scheme is not None
    if kind == "float16" and scheme.activations is not Activations.FLOAT:
        pytest.skip("integer products take float32")
    dtype = np.float16 if kind == "float16" else np.float32
    dims = SHAPES[shape]
    result = dims.replace("64", "48")
    model = build(
        f"""g ({kind}[{dims}] x) => ({kind}[{result}] y) {{
            t = MatMul(x, w)
            s = Add(t, b)
            y = {behind}(s) }}""",
        {"w": random_array(64, 48, dtype=dtype), "b": random_array(48, dtype=dtype)},
    )
    extents = [int(part) if part.strip().isdigit() else 3 for part in dims.split(",")]
    feeds = {"x": random_array(*extents, dtype=dtype)}
    np.savez(tmp_path / "call.npz", x=feeds["x"])
    static = scheme.activations is Activations.STATIC
    calibration = CalibrationOptions(str(tmp_path / "call.npz")) if static else None
    options = CompileOptions(
        scheme=text, calibration=calibration, never_slower=False if static else None
    )
    path = compile_model(model, options, output=tmp_path / "compiled.onnx").path
    _, optimized = run_optimized(path, feeds)
    (row,) = (r for r in ONNXRUNTIME.added_biases if r.activations is scheme.activations)
    adds = sum(node.op_type == "Add" for node in optimized.graph)
    assert adds == (0 if row.any_shape or shape != "free" else 1)
