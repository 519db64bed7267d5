"""How images become an input: size, layout, channel order and the arithmetic on pixels."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Final

from qcompiler.calibration.signature import Input
from qcompiler.errors import UsageError

_WHERE: Final = "image spec"
_KEYS: Final = (
    *("size", "layout", "channels", "scale", "mean", "std", "crop", "resize", "interpolation"),
)
_CHANNELS: Final = {"GRAY": 1, "RGB": 3, "BGR": 3, "RGBA": 4}
_DEFAULT_CHANNELS: Final = {1: "GRAY", 3: "RGB", 4: "RGBA"}


class Layout(StrEnum):
    """Order of the dimensions of an image input."""

    NCHW = "NCHW"
    NHWC = "NHWC"
    CHW = "CHW"
    HWC = "HWC"


class Interpolation(StrEnum):
    """How pixels are made when an image is resized, in Pillow's names."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Preprocessing: `(pixel * scale - mean) / std`, with pixels from 0 to 255.

    Attributes:
        size: Height and width of the input; None takes every image in its own size.
        layout: Order of the dimensions.
        channels: GRAY, RGB, BGR or RGBA.
        scale: Factor on pixels.
        mean: One number for each channel, subtracted after scaling.
        std: One number for each channel, divided by.
        crop: Whether the middle is cut out, so that proportions stay; else images are stretched.
        resize: Pixels that the shorter side gets before the middle is cut out; None is just enough.
        interpolation: How pixels are made when an image is resized.
        guessed: What was taken from the model's input, for reports.
    """

    size: tuple[int, int] | None
    layout: Layout
    channels: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: bool
    resize: int | None
    interpolation: Interpolation
    guessed: str

    @property
    def is_plain(self) -> bool:
        """Whether pixels are given as they are, so that an integer input can take them."""
        return self.scale == 1 and set(self.mean) == {0.0} and set(self.std) == {1.0}


def parse_image_spec(text: str | None, wanted: Input) -> ImageSpec:
    """Read a spec and complete it from the input of the model.

    Args:
        text: A .toml file with the keys below, or `key=value` items with commas between them:
            size (`224` or HEIGHTxWIDTH), layout, channels, scale (`1/255`), mean and std
            (`0.485,0.456,0.406` or one number), crop (`center` or `none`), resize, interpolation.
            None is an empty spec.
        wanted: The image input.

    Raises:
        UsageError: A key or value is unknown, or the input's shape does not go with it.
    """
    items = _read_items(text)
    unknown = [key for key in items if key not in _KEYS]
    if unknown:
        message = f"has no key {unknown[0]!r}"
        raise _refused(message, f"the keys are {', '.join(_KEYS)}")
    layout = _layout(items, wanted)
    channels = _channels(items, layout, wanted)
    integer = not wanted.dtype.is_floating_point()
    count = _CHANNELS[channels]
    size = _size(items, layout, wanted)
    guesses = {"size": f"{size[0]}x{size[1]}" if size else "as is"}
    guesses |= {"layout": layout.value, "channels": channels}
    spec = ImageSpec(
        size,
        layout,
        channels,
        _number("scale", items.get("scale", "1" if integer else "1/255")),
        _numbers("mean", items.get("mean", "0"), count),
        _numbers("std", items.get("std", "1"), count),
        _choice("crop", items.get("crop", "none"), ("center", "none")) == "center",
        _positive("resize", items["resize"]) if "resize" in items else None,
        Interpolation(
            _choice("interpolation", items.get("interpolation", "bilinear"), tuple(Interpolation))
        ),
        ", ".join(f"{key} {value}" for key, value in guesses.items() if key not in items),
    )
    _check_together(spec, items, integer)
    return spec


def _check_together(spec: ImageSpec, items: Mapping[str, str], integer: bool) -> None:
    if integer and not spec.is_plain:
        message = "has scale, mean or std, and the input takes integers"
        raise _refused(message, "leave them out")
    if 0.0 in spec.std:
        message = "has a std of 0"
        raise _refused(message, "pixels are divided by it")
    if "resize" in items and not spec.crop:
        message = "has resize without crop=center"
        raise _refused(message, "size alone stretches the image")
    if spec.crop and (spec.size is None or (spec.resize or max(spec.size)) < max(spec.size)):
        message = "crops more than there is"
        raise _refused(message, "crop=center needs a size, not above resize")


def _read_items(text: str | None) -> dict[str, str]:
    if not text:
        return {}
    if "=" not in text:
        return _read_toml(Path(text))
    items: dict[str, str] = {}
    for item in re.split(r",(?=\s*[A-Za-z_]+\s*=)", text):
        key, separator, value = (part.strip() for part in item.partition("="))
        if not separator or not value or key in items:
            message = f"{item!r} is no key=value, or is there twice"
            raise _refused(message, "size=224,crop=center")
        items[key] = value.strip("[]")
    return items


def _read_toml(path: Path) -> dict[str, str]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"cannot be read as TOML: {error}"
        hint = "an image spec is a TOML file, or size=224,mean=0.485,0.456,0.406,..."
        raise UsageError(message, where=str(path), hint=hint) from error
    return {
        key: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in table.items()
    }


def _layout(items: Mapping[str, str], wanted: Input) -> Layout:
    shape = wanted.shape or ()
    given = items.get("layout")
    if given is not None:
        layout = Layout(_choice("layout", given.upper(), tuple(Layout)))
        if len(layout) == len(shape):
            return layout
        message = f"has layout {layout}, and the input is {wanted}"
        raise _refused(message, "their ranks differ")
    choices = {3: (Layout.CHW, Layout.HWC), 4: (Layout.NCHW, Layout.NHWC)}.get(len(shape), ())
    found = [c for c in choices if shape[c.index("C")] in _DEFAULT_CHANNELS]
    if len(found) == 1:
        return found[0]
    message = f"needs a layout: it cannot be told from the input {wanted}"
    raise _refused(message, f"layout={' or '.join(choices) or 'NCHW'}")


def _channels(items: Mapping[str, str], layout: Layout, wanted: Input) -> str:
    size = (wanted.shape or ())[layout.index("C")]
    default = _DEFAULT_CHANNELS.get(size, "RGB") if isinstance(size, int) else "RGB"
    channels = _choice("channels", items.get("channels", default).upper(), tuple(_CHANNELS))
    if isinstance(size, int) and size != _CHANNELS[channels]:
        message = f"has channels {channels}, and the input is {wanted}"
        raise _refused(message, "set layout too")
    return channels


def _size(items: Mapping[str, str], layout: Layout, wanted: Input) -> tuple[int, int] | None:
    shape = wanted.shape or ()
    dims = (shape[layout.index("H")], shape[layout.index("W")])
    if "size" in items:
        parts = items["size"].lower().replace("x", ",").split(",")
        if len(parts) not in (1, 2):
            message = f"has size {items['size']}"
            raise _refused(message, "size=224 or size=HEIGHTxWIDTH")
        height, width = (_positive("size", part) for part in (parts[0], parts[-1]))
        if any(isinstance(d, int) and d != s for d, s in zip(dims, (height, width), strict=True)):
            message = f"has size {height}x{width}, and the input is {wanted}"
            raise _refused(message, "leave it out")
        return height, width
    if isinstance(dims[0], int) and isinstance(dims[1], int):
        return dims[0], dims[1]
    if isinstance(dims[0], int) or isinstance(dims[1], int):
        message = f"needs a size for the input {wanted}"
        raise _refused(message, "size=HEIGHTxWIDTH")
    return None


def _choice(key: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        message = f"has {key} {value!r}"
        raise _refused(message, f"{key} is {' or '.join(choices)}")
    return value


def _positive(key: str, text: str) -> int:
    number = int(text) if text.strip().isascii() and text.strip().isdigit() else 0
    if number < 1:
        message = f"has {key} {text!r}"
        raise _refused(message, f"{key} is a number of pixels")
    return number


def _number(key: str, text: str) -> float:
    try:
        top, _, bottom = text.partition("/")
        return float(Fraction(top.strip()) / Fraction(bottom.strip() or "1"))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        message = f"has {key} {text!r}"
        raise _refused(message, f"{key} is a number such as 0.5 or 1/255") from error


def _numbers(key: str, text: str, count: int) -> tuple[float, ...]:
    numbers = tuple(_number(key, part) for part in text.replace(",", " ").split())
    if len(numbers) not in (1, count):
        message = f"has {len(numbers)} numbers in {key}"
        raise _refused(message, f"give 1 or {count}, one a channel")
    return numbers * (count if len(numbers) == 1 else 1)


def _refused(message: str, hint: str) -> UsageError:
    return UsageError(message, where=_WHERE, hint=hint)
