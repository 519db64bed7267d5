"""Preprocessing specs of images, and what is taken from the model's input."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.calibration.image_spec import ImageSpec, Interpolation, Layout, parse_image_spec
from qcompiler.calibration.signature import Input
from qcompiler.errors import UsageError

NCHW = ("n", 3, 8, 6)


def _input(shape: Any, dtype: ir.DataType = ir.DataType.FLOAT) -> Input:
    return Input("x", dtype, shape, False)


def _spec(text: str | None, shape: Any = NCHW, dtype: ir.DataType = ir.DataType.FLOAT) -> ImageSpec:
    return parse_image_spec(text, _input(shape, dtype))


def _refusal(text: str, shape: Any = NCHW, dtype: ir.DataType = ir.DataType.FLOAT) -> UsageError:
    with pytest.raises(UsageError) as caught:
        _spec(text, shape, dtype)
    return caught.value


def test_everything_has_a_default() -> None:
    spec = _spec(None)
    assert (spec.size, spec.layout, spec.channels) == ((8, 6), Layout.NCHW, "RGB")
    assert (spec.scale, spec.mean, spec.std) == (1 / 255, (0.0,) * 3, (1.0,) * 3)
    assert (spec.crop, spec.interpolation) == (False, Interpolation.BILINEAR)
    assert spec.guessed == "size 8x6, layout NCHW, channels RGB"


def test_every_key_is_read() -> None:
    spec = _spec(
        "size=224x200, layout=nhwc,mean=0.485,0.456, 0.406,std=[0.2,0.3,1/4],channels=bgr,scale=1,"
        "crop=center,resize=256,interpolation=bicubic",
        ("n", "h", "w", 3),
    )
    assert (spec.size, spec.layout, spec.channels, spec.scale) == ((224, 200), "NHWC", "BGR", 1.0)
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.2, 0.3, 0.25))
    assert (spec.crop, spec.resize, spec.interpolation) == (True, 256, Interpolation.BICUBIC)
    assert spec.guessed == ""


def test_a_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text('size = [8, 6]\nmean = [0.1, 0.2, 0.3]\nstd = 0.5\nscale = "1/255"\n')
    assert _spec(str(path)) == _spec("size=8x6,mean=0.1,0.2,0.3,std=0.5,scale=1/255")


@pytest.mark.parametrize(
    ("shape", "layout", "channels"),
    [
        (("n", 3, "h", "w"), "NCHW", "RGB"),
        ((1, 1, 28, 28), "NCHW", "GRAY"),
        (("n", 8, 8, 4), "NHWC", "RGBA"),
        ((3, 8, 8), "CHW", "RGB"),
        ((8, 8, 1), "HWC", "GRAY"),
    ],
)
def test_layout_and_channels_are_told_from_the_shape(
    shape: Any, layout: str, channels: str
) -> None:
    spec = _spec(None, shape)
    assert (spec.layout, spec.channels) == (layout, channels)


@pytest.mark.parametrize(
    "shape", [("n", "c", "h", "w"), (1, 3, 8, 3), ("n", 5, 8, 8), ("n", 3), None]
)
def test_a_layout_that_cannot_be_told_must_be_given(shape: Any) -> None:
    assert "needs a layout: it cannot be told from the input x" in _refusal("size=8", shape).message


def test_a_layout_settles_what_is_unclear() -> None:
    assert _spec("layout=NHWC", (1, 3, 8, 3)).size == (3, 8)


def test_images_keep_their_size_where_nothing_fixes_one() -> None:
    spec = _spec(None, ("n", 3, "h", "w"))
    assert spec.size is None
    assert spec.guessed.startswith("size as is")


def test_integers_take_pixels_as_they_are() -> None:
    assert _spec(None, dtype=ir.DataType.UINT8).is_plain
    assert not _spec(None).is_plain
    assert _spec("scale=1").is_plain
    error = _refusal("mean=0.5", dtype=ir.DataType.UINT8)
    assert error.message == "has scale, mean or std, and the input takes integers"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour=1", "has no key 'colour'"),
        ("size=224,size=3", "'size=3' is no key=value, or is there twice"),
        ("size=", "'size=' is no key=value, or is there twice"),
        ("size=0", "has size '0'"),
        ("size=1x2x3", "has size 1x2x3"),
        ("size=8", "has size 8x8, and the input is x float32[n, 3, 8, 6]"),
        ("layout=ABCD", "has layout 'ABCD'"),
        ("layout=CHW", "has layout CHW, and the input is x float32[n, 3, 8, 6]"),
        ("channels=GRAY", "has channels GRAY, and the input is x float32[n, 3, 8, 6]"),
        ("channels=CMYK", "has channels 'CMYK'"),
        ("mean=1,2", "has 2 numbers in mean"),
        ("mean=a", "has mean 'a'"),
        ("scale=1/0", "has scale '1/0'"),
        ("scale=1e999", "has scale '1e999'"),
        ("std=1,0,1", "has a std of 0"),
        ("crop=left", "has crop 'left'"),
        ("resize=256", "has resize without crop=center"),
        ("crop=center,resize=7", "crops more than there is"),
        ("interpolation=none", "has interpolation 'none'"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str) -> None:
    error = _refusal(text)
    assert (error.where, error.message) == ("image spec", message)
    assert error.hint


def test_a_half_known_size_must_be_given() -> None:
    assert _refusal("scale=1", ("n", 3, 8, "w")).message.startswith("needs a size for the input x")
    assert _spec("size=8x5", ("n", 3, 8, "w")).size == (8, 5)


def test_a_crop_needs_a_size() -> None:
    assert _refusal("crop=center", ("n", 3, "h", "w")).message == "crops more than there is"


@pytest.mark.parametrize("content", [None, "size = ", "\x00"])
def test_a_file_that_cannot_be_read_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "s.toml").write_text(content)
    assert _refusal(str(tmp_path / "s.toml")).message.startswith("cannot be read as TOML")


@given(text=st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        spec = _spec(f"mean={text}")
    except UsageError:
        return
    assert len(spec.mean) == 3
