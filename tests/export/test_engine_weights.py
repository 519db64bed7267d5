"""Looking for the weights of a graph in an engine."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.export.engine_weights import WeightFinding, find_weights
from tests.support.graphs import Array, build, random_array

SCALES = np.abs(random_array(2, 64, seed=5)).astype(np.float16) / 50 + np.float16(0.01)
CODES = np.random.default_rng(1).integers(-7, 8, (128, 64), dtype=np.int8)


def int4(codes: Array) -> ir.TensorProtocol:
    return ir.tensor(codes.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4)


def quantized() -> ir.Model:
    text = """g (float16[N, 128] x) => (float16[N, 64] y) {
        d = DequantizeLinear<axis = 0, block_size = 64>(codes, scale) y = MatMul(x, d) }"""
    return build(text, {"codes": int4(CODES), "scale": SCALES})


def plain(weight: Array) -> ir.Model:
    text = "g (float16[N, 64] x) => (float16[N, 64] y) { y = MatMul(x, w) }"
    return build(text, {"w": weight})


def found(model: ir.Model, folder: Path, *parts: bytes) -> WeightFinding:
    """Return the finding of the one weight of a model in an engine of these parts."""
    (folder / "m.engine").write_bytes(b"head" * 7 + b"".join(parts) + b"tail")
    (finding,) = find_weights(folder / "m.engine", model)
    return finding


def packed(codes: Array) -> bytes:
    return bytes(int4(np.ascontiguousarray(codes)).tobytes())


def decoded(kind: Any) -> bytes:
    values = CODES.astype(np.float32) * np.repeat(SCALES, 64, 0).astype(np.float32)
    return bytes(values.astype(kind).tobytes())


@pytest.mark.parametrize("turned", [False, True])
def test_codes_as_planned(turned: bool, tmp_path: Path) -> None:
    finding = found(quantized(), tmp_path, packed(CODES.T if turned else CODES))
    assert finding == WeightFinding("codes", ir.DataType.INT4, (ir.DataType.INT4,), 128 * 64)
    assert finding.wider is None
    assert finding.planned_bytes == 4096


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (decoded(np.float16), ir.DataType.FLOAT16),
        (decoded(np.float32), ir.DataType.FLOAT),
        (CODES.tobytes(), ir.DataType.INT8),
    ],
)
def test_codes_that_were_decoded(stored: bytes, dtype: ir.DataType, tmp_path: Path) -> None:
    assert found(quantized(), tmp_path, stored).wider is dtype
    both = found(quantized(), tmp_path, packed(CODES), stored)
    assert both.found == (ir.DataType.INT4, dtype)
    assert both.wider is dtype


def test_what_is_arranged_in_another_way_is_not_found(tmp_path: Path) -> None:
    finding = found(quantized(), tmp_path, bytes(CODES[::-1, ::-1]))
    assert (finding.found, finding.wider) == ((), None)
    # At a place where no engine puts a weight.
    assert found(quantized(), tmp_path, b"odd", packed(CODES)).found == ()


def test_float_weights(tmp_path: Path) -> None:
    weight = random_array(64, 64).astype(np.float16)
    assert found(plain(weight), tmp_path, weight.tobytes()).found == (ir.DataType.FLOAT16,)
    wide = weight.astype(np.float32).tobytes()
    assert found(plain(weight), tmp_path, wide).wider is ir.DataType.FLOAT


def test_weights_that_were_laid_side_by_side(tmp_path: Path) -> None:
    weight, other = (random_array(64, 64, seed=seed).astype(np.float16) for seed in (1, 2))
    joined = np.concatenate([other, weight], axis=1)
    assert found(plain(weight), tmp_path, joined.tobytes()).found == (ir.DataType.FLOAT16,)


def test_channels_last(tmp_path: Path) -> None:
    weight = random_array(8, 16, 3, 3).astype(np.float16)
    text = "g (float16[N, 16, 8, 8] x) => (float16[N, 8, 6, 6] y) { y = Conv(x, w) }"
    last = np.moveaxis(weight, 1, -1).tobytes()
    assert found(build(text, {"w": weight}), tmp_path, last).found == (ir.DataType.FLOAT16,)


def test_rows_of_zeros_say_nothing(tmp_path: Path) -> None:
    weight = random_array(64, 64).astype(np.float16)
    weight[:3] = 0
    assert found(plain(weight), tmp_path, bytes(4096)).found == ()
    assert found(plain(weight), tmp_path, weight.tobytes()).found == (ir.DataType.FLOAT16,)


def test_a_few_zeros_at_the_beginning_say_nothing(tmp_path: Path) -> None:
    codes = CODES.copy()
    codes[:, :8] = 0
    codes[:8] = 0
    model = build(
        """g (float16[N, 128] x) => (float16[N, 64] y) {
        d = DequantizeLinear<axis = 0, block_size = 64>(codes, scale) y = MatMul(x, d) }""",
        {"codes": int4(codes), "scale": SCALES},
    )
    assert found(model, tmp_path, bytes(4096), packed(codes)).found == (ir.DataType.INT4,)


def test_scales_indices_and_small_constants_are_no_weights(tmp_path: Path) -> None:
    text = """g (float16[N] x) => (float16[N] y) { a = Add(x, small) y = Gather(a, index) }"""
    model = build(text, {"small": np.ones(1, np.float16), "index": np.arange(4096)})
    (tmp_path / "m.engine").write_bytes(bytes(64))
    assert find_weights(tmp_path / "m.engine", model) == ()
