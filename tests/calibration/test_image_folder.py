"""Samples from images."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.calibration import image_folder
from qcompiler.calibration.calls import SampleOptions, Samples
from qcompiler.calibration.samples import open_samples
from qcompiler.errors import UsageError
from tests.support.graphs import build

Image = pytest.importorskip("PIL.Image")


def _model(text: str = "float[n, 3, 5, 6]") -> ir.Model:
    return build(f"g ({text} x) => (float y) {{ y = Constant<value_float=1.0>() }}")


def _pixels(height: int = 5, width: int = 6, channels: int = 3, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return values[..., 0] if channels == 1 else values


def _saved(folder: Path, *images: Any, suffix: str = "png") -> Path:
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{index}.{suffix}")
    return folder


def _open(path: Path, model: str = "float[n, 3, 5, 6]", spec: str = "", **more: Any) -> Samples:
    return open_samples(str(path), _model(model), SampleOptions(image_spec=spec, **more))


def _only(path: Path, model: str = "float[n, 3, 5, 6]", spec: str = "") -> npt.NDArray[Any]:
    (feeds,) = _open(path, model, spec)
    return feeds["x"]


def _refusal(path: Path, model: str = "float[n, 3, 5, 6]", **more: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        list(_open(path, model, **more))
    return caught.value


def test_pixels_are_scaled_and_normalized_for_each_channel(tmp_path: Path) -> None:
    pixels = _pixels()
    x = _only(_saved(tmp_path, pixels), spec="mean=0.1,0.2,0.3,std=0.5,0.6,0.7")
    expected = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    assert x.dtype == np.dtype(np.float32)
    assert x.flags.c_contiguous
    np.testing.assert_allclose(x[0], expected.transpose(2, 0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "axes"),
    [
        ("float[n, 3, 5, 6]", (2, 0, 1)),
        ("float[n, 5, 6, 3]", (0, 1, 2)),
        ("float[3, 5, 6]", (2, 0, 1)),
        ("float[5, 6, 3]", (0, 1, 2)),
    ],
)
def test_layouts(model: str, axes: tuple[int, ...], tmp_path: Path) -> None:
    pixels = _pixels()
    x = _only(_saved(tmp_path, pixels), model, "scale=1")
    assert x.ndim == model.count(",") + 1
    np.testing.assert_array_equal(x.reshape(x.shape[-3:]), pixels.transpose(axes))


def test_channel_orders(tmp_path: Path) -> None:
    pixels = _pixels()
    _saved(tmp_path, pixels)
    bgr = _only(tmp_path, spec="scale=1,channels=BGR")
    np.testing.assert_array_equal(bgr[0], pixels[..., ::-1].transpose(2, 0, 1))
    gray = _only(tmp_path, "float[n, 1, 5, 6]", "scale=1")
    expected = pixels @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(gray[0, 0], expected, rtol=0, atol=1)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_become_the_channels_that_the_model_takes(channels: int, tmp_path: Path) -> None:
    for wanted in (1, 3, 4):
        _saved(tmp_path, _pixels(channels=channels))
        assert _only(tmp_path, f"float[n, {wanted}, 5, 6]").shape == (1, wanted, 5, 6)


@pytest.mark.parametrize("spec", ["", "scale=1"])
def test_integer_inputs_take_raw_pixels(spec: str, tmp_path: Path) -> None:
    pixels = _pixels()
    x = _only(_saved(tmp_path, pixels), "uint8[n, 5, 6, 3]", spec)
    assert x.dtype == np.dtype(np.uint8)
    np.testing.assert_array_equal(x[0], pixels)


def test_half_inputs_are_cast(tmp_path: Path) -> None:
    x = _only(_saved(tmp_path, _pixels()), "float16[n, 3, 5, 6]")
    assert x.dtype == np.dtype(np.float16)


def test_images_are_stretched_or_cropped(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 3:9] = 255  # the middle half
    _saved(tmp_path, pixels)
    stretched = _only(tmp_path)
    assert stretched.shape == (1, 3, 5, 6)
    assert stretched[0, 0, 0, 0] < 0.5
    np.testing.assert_array_equal(_only(tmp_path, spec="crop=center"), np.ones((1, 3, 5, 6)))


def test_resize_sets_the_shorter_side_before_the_crop(tmp_path: Path) -> None:
    _saved(tmp_path, _pixels(40, 80))
    x = _only(tmp_path, "float[n, 3, 5, 5]", "crop=center,resize=9,scale=1,interpolation=nearest")
    with Image.open(tmp_path / "0.png") as image:
        small = np.asarray(image.resize((18, 9), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(x[0], small[2:7, 6:11].transpose(2, 0, 1))


def test_images_of_their_own_sizes_are_ragged(tmp_path: Path) -> None:
    _saved(tmp_path, _pixels(5, 6), _pixels(5, 7))
    samples = _open(tmp_path, "float[n, 3, h, w]")
    assert [feeds["x"].shape for feeds in samples] == [(1, 3, 5, 6), (1, 3, 5, 7)]
    error = _refusal(tmp_path, "float[n, 3, h, w]", batch_size=2)
    assert "need images of one size" in error.message


def test_images_are_put_into_batches(tmp_path: Path) -> None:
    _saved(tmp_path, *(_pixels(seed=seed) for seed in range(5)))
    assert [feeds["x"].shape[0] for feeds in _open(tmp_path, batch_size=2)] == [2, 2, 1]
    fixed = _open(tmp_path, "float[2, 3, 5, 6]")
    assert [feeds["x"].shape[0] for feeds in fixed] == [2, 2]
    assert "(4 of 5 images;" in fixed.origin
    assert _refusal(tmp_path, "float[2, 3, 5, 6]", batch_size=3).where == "batch_size"
    assert _refusal(tmp_path, "float[8, 3, 5, 6]").message == "holds 5 images, and a call takes 8"


def test_the_origin_states_what_was_guessed(tmp_path: Path) -> None:
    _saved(tmp_path, _pixels(), _pixels())
    assert _open(tmp_path, spec="channels=RGB").origin == (
        f"2 calls from {tmp_path.name}/ (2 of 2 images; from the model: size 5x6, layout NCHW)"
    )


def test_few_samples_are_taken_evenly_from_all_folders(tmp_path: Path) -> None:
    for folder in range(3):
        (tmp_path / f"class{folder}").mkdir()
        _saved(tmp_path / f"class{folder}", *(np.full((5, 6, 3), folder, np.uint8),) * 4)
    samples = _open(tmp_path, spec="scale=1", max_samples=3)
    assert [int(feeds["x"].max()) for feeds in samples] == [0, 1, 2]
    assert "(3 of 12 images;" in samples.origin


def test_one_image_can_be_named(tmp_path: Path) -> None:
    _saved(tmp_path, _pixels(), _pixels())
    assert len(_open(tmp_path / "1.png")) == 1


def test_nothing_is_decoded_until_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved(tmp_path, _pixels(), _pixels())
    (tmp_path / "2.png").write_bytes(b"broken")
    read: list[str] = []
    real = image_folder._read_image

    def recorded(path: Path, *more: Any) -> Any:
        read.append(path.name)
        return real(path, *more)

    monkeypatch.setattr(image_folder, "_read_image", recorded)
    calls = iter(_open(tmp_path))
    assert read == []
    next(calls)
    assert read == ["0.png"]
    next(calls)
    with pytest.raises(UsageError, match=r"2\.png: cannot be read as an image"):
        next(calls)


def test_other_formats_are_read(tmp_path: Path) -> None:
    pixels = np.full((5, 6, 3), 200, np.uint8)
    _saved(tmp_path, pixels, suffix="jpg")
    (tmp_path / "sub").mkdir()
    _saved(tmp_path / "sub", pixels, suffix="BMP")
    for feeds in _open(tmp_path, spec="scale=1"):
        np.testing.assert_allclose(feeds["x"], 200, rtol=0, atol=2)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pixels_of_more_than_8_bits_are_refused(dtype: Any, tmp_path: Path) -> None:
    Image.fromarray(np.ones((5, 6), dtype)).save(tmp_path / "0.tiff")
    assert "its pixels have more than 8 bits" in _refusal(tmp_path).message


def test_images_above_the_limit_are_refused(tmp_path: Path) -> None:
    error = _refusal(_saved(tmp_path, _pixels(40, 40)), max_bytes=1000)
    assert "40 x 40 pixels need more than the limit of 1000 bytes" in error.message


def test_models_with_more_inputs_are_refused(tmp_path: Path) -> None:
    model = build(
        "g (float[1, 3, 5, 6] x, int64[1] k) => (float y) { y = Constant<value_float=1.0>() }"
    )
    _saved(tmp_path, _pixels())
    with pytest.raises(UsageError, match="images are for a model with one input"):
        open_samples(str(tmp_path), model, SampleOptions())


def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved(tmp_path, _pixels())
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert _refusal(tmp_path).hint == 'pip install "qcompiler[images]"'
