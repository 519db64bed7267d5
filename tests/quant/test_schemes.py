"""The types that describe a quantization, and their text forms."""

from typing import Any

import ml_dtypes
import pytest

from qcompiler.errors import UsageError
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor, scale_shape
from qcompiler.quant.qtype import QTYPES, QType, qtype_of
from qcompiler.quant.scheme import SCHEME_FORMS, parse_scheme


@pytest.mark.parametrize("qtype", QTYPES, ids=str)
def test_a_type_has_as_many_codes_as_its_bits_and_fits_its_storage(qtype: QType) -> None:
    if qtype.floating:
        # Two patterns are NaN, and two are 0.
        finite: Any = ml_dtypes.finfo(ml_dtypes.float8_e4m3fn)
        assert (qtype.qmin, qtype.qmax) == (finite.min, finite.max)
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


def test_one_scale_for_a_weight_is_too_coarse_below_8_bits() -> None:
    with pytest.raises(UsageError, match=r"too coarse below 8 bits \(use w4a16:b128"):
        parse_scheme("w4a16:tensor")
