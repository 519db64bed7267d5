"""Samples from a folder of images, decoded one call at a time."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.calls import Feeds, SampleOptions, Samples, counted
from qcompiler.calibration.folder_files import list_files
from qcompiler.calibration.image_spec import ImageSpec, Interpolation, parse_image_spec
from qcompiler.calibration.signature import Signature
from qcompiler.errors import UsageError

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_DEEP: Final = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
"""Pillow's modes with more than 8 bits, which it would clip."""


def open_images(path: Path, signature: Signature, options: SampleOptions) -> Samples:
    """Open a folder of images, folders in it too, or one image, for a model with one input.

    With `max_samples` the images are taken evenly over the sorted list, since folders are often
    sorted by class.

    Raises:
        UsageError: Pillow is missing, there are no images, the spec is wrong, or the model does
            not take images.
    """
    _require_pillow(path)
    if len(signature.required) != 1:
        message = f"images are for a model with one input, and this one takes {signature}"
        hint = "write the inputs with np.savez, or give them with module:function"
        raise UsageError(message, where=str(path), hint=hint)
    wanted = signature.required[0]
    spec = parse_image_spec(options.image_spec, wanted)
    first = (wanted.shape or ())[0] if spec.layout.startswith("N") else 1
    fixed = first if isinstance(first, int) else None
    batch = options.batch_size or fixed or 1
    if fixed not in (None, batch):
        message = f"the model takes batches of {fixed}, not of {batch}"
        raise UsageError(message, where="batch_size")
    if spec.size is None and batch > 1:
        message = f"batches of {batch} need images of one size, and neither model nor spec has one"
        raise UsageError(message, where="image spec", hint="size=HEIGHTxWIDTH")
    files = list_files(path, SUFFIXES, recursive=True) if path.is_dir() else [path]
    used = _evenly(files, options.max_samples)
    calls = len(used) // batch if fixed else -(-len(used) // batch)
    if not calls:
        message = f"holds {len(files)} images, and a call takes {batch}"
        hint = f"images end in {', '.join(sorted(SUFFIXES))}"
        raise UsageError(message, where=str(path), hint=hint)
    used = used[: calls * batch]

    def read() -> Iterator[Feeds]:
        source = iter(used)
        while call := list(itertools.islice(source, batch)):
            images = [_read_image(file, spec, options.max_bytes) for file in call]
            array = _assemble(images, spec, wanted.dtype.is_floating_point())
            yield signature.feeds({wanted.name: array}, str(call[0]))

    guessed = f"; from the model: {spec.guessed}" if spec.guessed else ""
    name = f"{path.name}/" if path.is_dir() else path.name
    origin = f"{counted(calls, 'call')} from {name} ({len(used)} of {len(files)} images{guessed})"
    return Samples(origin, False, calls, read)


def _evenly(files: list[Path], limit: int | None) -> list[Path]:
    if limit is None or limit >= len(files):
        return files
    return [files[index * len(files) // limit] for index in range(limit)]


def _require_pillow(path: Path) -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        message = "images need the package Pillow, which is not installed"
        hint = 'pip install "qcompiler[images]"'
        raise UsageError(message, where=str(path), hint=hint) from error


def _read_image(path: Path, spec: ImageSpec, limit: int) -> npt.NDArray[np.uint8]:
    """Return the pixels, uint8 [height, width, channels], in the spec's size."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height * 4 > limit:
                message = f"{width} x {height} pixels need more than the limit of {limit} bytes"
                raise ValueError(message)
            if image.mode in _DEEP:
                message = f"its pixels have more than 8 bits (mode {image.mode})"
                raise ValueError(message)
            mode = {"GRAY": "L", "BGR": "RGB"}.get(spec.channels, spec.channels)
            pixels = np.asarray(_fit(image.convert(mode), spec), np.uint8)
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        message = f"cannot be read as an image: {str(error) or type(error).__name__}"
        raise UsageError(message, where=str(path), hint="remove it from the folder") from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return pixels[..., ::-1] if spec.channels == "BGR" else pixels


_DAMAGED: Final = (OSError, ValueError, SyntaxError, EOFError, TypeError, MemoryError)
"""What Pillow raises on files that are damaged or something else."""


def _fit(image: Any, spec: ImageSpec) -> Any:
    """Resize an image to the spec's size, and cut its middle out if so asked."""
    from PIL import Image

    if spec.size is None:
        return image
    method = {
        Interpolation.NEAREST: Image.Resampling.NEAREST,
        Interpolation.BILINEAR: Image.Resampling.BILINEAR,
        Interpolation.BICUBIC: Image.Resampling.BICUBIC,
        Interpolation.LANCZOS: Image.Resampling.LANCZOS,
    }[spec.interpolation]
    height, width = spec.size
    if not spec.crop:
        return image.resize((width, height), method)
    # The factor under which the shorter side is `resize`, or the image just covers the size.
    factor = max(width / image.width, height / image.height)
    if spec.resize is not None:
        factor = spec.resize / min(image.width, image.height)
    scaled = image.resize(
        (max(width, round(image.width * factor)), max(height, round(image.height * factor))), method
    )
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def _assemble(
    images: Sequence[npt.NDArray[np.uint8]], spec: ImageSpec, to_float: bool
) -> npt.NDArray[Any]:
    """Stack images and do the spec's arithmetic, in float32 for an input that takes floats."""
    batch = np.stack(images)
    result: npt.NDArray[Any] = batch
    if to_float:
        mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
        result = (batch.astype(np.float32) * np.float32(spec.scale) - mean) / std
    if spec.layout.endswith("CHW"):
        result = result.transpose(0, 3, 1, 2)
    result = np.ascontiguousarray(result)
    return result if spec.layout.startswith("N") else result[0]
