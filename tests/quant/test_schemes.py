"""The types that describe a quantization, and their text forms."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import UsageError
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor, scale_shape
from qcompiler.quant.qtype import FP8, QTYPES, QType, qtype_of
from qcompiler.quant.scheme import SCHEME_FORMS, parse_scheme


@pytest.mark.parametrize("qtype", QTYPES, ids=str)
def test_a_type_has_as_many_codes_as_its_bits_and_fits_its_storage(qtype: QType) -> None:
    if qtype.floating:
        patterns = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        numbers = patterns.astype(np.float32)
        assert (qtype.qmin, qtype.qmax) == (np.nanmin(numbers), np.nanmax(numbers))
        assert qtype_of(qtype.bits, signed=True) != qtype
        return
    assert qtype.qmax - qtype.qmin + 1 == 2**qtype.bits
    assert qtype_of(qtype.bits, signed=qtype.signed) == qtype
    storage = getattr(ml_dtypes, qtype.onnx_name.lower(), None)
    if qtype.storage_bits < 8:
        limits: Any = ml_dtypes.iinfo(storage)  # type: ignore[no-untyped-call]
        assert limits.min <= qtype.qmin
        assert qtype.qmax <= limits.max
    assert qtype.onnx_name.endswith(str(qtype.storage_bits))
    assert qtype.onnx_name.startswith("INT" if qtype.signed else "UINT")


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no signed 5-bit integer type \(known: int8, uint8"):
        qtype_of(5, signed=True)


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (PerTensor(), ()),
        (PerAxis(1), (1024,)),
        (PerBlock(0, 64), (4, 1024)),
        (PerBlock(1, 100), (256, 11)),
    ],
    ids=str,
)
def test_scale_shapes(granularity: Granularity, expected: tuple[int, ...]) -> None:
    assert scale_shape((256, 1024), granularity) == expected


@pytest.mark.parametrize("granularity", [PerAxis(2), PerAxis(-1), PerBlock(0, 0)], ids=str)
def test_granularities_that_do_not_fit_are_refused(granularity: Granularity) -> None:
    with pytest.raises(ValueError, match=r"outside a tensor of shape|below 1"):
        scale_shape((256, 1024), granularity)


@pytest.mark.parametrize("text", [*SCHEME_FORMS, "w4a16:b32:sym", "w2a16:b64:asym", "w4a16:asym"])
def test_schemes_round_trip(text: str) -> None:
    scheme = parse_scheme(text)
    assert text == ("float" if scheme is None else str(scheme))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w4",
        "W4A16",
        "w4a16:b33",
        "w4a16:b8",
        "w4a8-dynamic",
        "x",
        "w4a16:tensor",
        "w8a16:b32:tensor",
        "w8a8:tensor:b32",
    ],
)
def test_bad_schemes_are_usage_errors_that_help(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_scheme(text)
    assert repr(text) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["nvfp4", "fp4", "w4a16:fp4"])
def test_four_bit_floats_are_refused_with_what_exists(text: str) -> None:
    with pytest.raises(UsageError, match=r"no scheme makes weights of 4-bit floats") as caught:
        parse_scheme(text)
    assert caught.value.reason == "no-fp4-scheme"
    assert "w4a16:b32" in (caught.value.hint or "")


def test_floats_of_8_bits_are_a_type_of_weights_and_activations() -> None:
    scheme = parse_scheme("fp8")
    assert scheme is not None
    assert scheme.weight_type == scheme.activation_type(signed=False) == FP8
    assert scheme.weight_spec(PerAxis(1)).symmetric


def test_one_scale_for_a_weight_is_too_coarse_below_8_bits() -> None:
    with pytest.raises(UsageError, match=r"too coarse below 8 bits \(use w4a16:b128"):
        parse_scheme("w4a16:tensor")
