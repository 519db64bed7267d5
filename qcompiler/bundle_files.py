"""What an edge bundle is on disk: a folder of files with fixed names, and a list of their hashes.

What a bundle says of itself is untrusted: it may have come over a network, or lost a part there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from qcompiler.errors import ModelError, UsageError
from qcompiler.export.tensorrt_profiles import ShapeRange
from qcompiler.export.to_tensorrt import LIBRARIES, EngineOptions
from qcompiler.export.trtexec_script import DEVICE_ENGINE, TIMING_CACHE
from qcompiler.progress import Progress

LIST: Final = "bundle.json"
MODEL: Final = "model.onnx"
SCRIPT: Final = "build.sh"
REPORTS: Final = ("model.report.json", "model.report.html")
"""They hold times, so their hashes would make equal bundles differ: they are not listed."""
MADE_ON_DEVICE: Final = (DEVICE_ENGINE, f"{DEVICE_ENGINE}.manifest.json", TIMING_CACHE)
"""What building adds to a bundle."""

_SCHEMA: Final = "qcompiler-bundle"
_VERSION: Final = 1
_CHUNK: Final = 1 << 22
_DAMAGED: Final = "copy the bundle again, or make it anew"


@dataclass(frozen=True, slots=True)
class BundledFile:
    """A file of a bundle.

    Attributes:
        name: Its name in the folder.
        bytes: Its size.
        sha256: Its hash, hex.
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a bundle says of itself.

    Attributes:
        qcompiler: Version of the package that made it.
        target: Name of the target.
        options: How its engine is built.
        engine: An engine that lies in it already, None for none.
        no_script: Why there is no `build.sh`; None where there is one.
        files: All files but this list and the report.
    """

    qcompiler: str
    target: str
    options: EngineOptions
    engine: str | None
    no_script: str | None
    files: tuple[BundledFile, ...]


def facts_of(path: Path, progress: Progress | None = None) -> BundledFile:
    """Return name, size and hash of a file.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as stream:
        if progress is None:
            digest = hashlib.file_digest(stream, "sha256")
        else:
            with progress.task(f"hashing {path.name}", size) as advance:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    advance(len(chunk))
    return BundledFile(path.name, size, digest.hexdigest())


def bundle_json(bundle: Bundle) -> str:
    """Return the list as JSON text; it holds no time and no path."""
    options = bundle.options
    content = {
        "schema": _SCHEMA,
        "schema_version": _VERSION,
        "qcompiler": bundle.qcompiler,
        "target": bundle.target,
        "engine": bundle.engine,
        "no_script": bundle.no_script,
        "build": {
            "library": options.library,
            "profile": {name: _shapes(shapes) for name, shapes in sorted(options.profile.items())},
            "capabilities": list(options.capabilities),
            "flags": sorted(set(options.flags)),
            "pools": dict(sorted(options.pools.items())),
            "optimization_level": options.optimization_level,
            "hardware_compatibility": options.hardware_compatibility,
        },
        "files": [asdict(file) for file in bundle.files],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _shapes(shapes: ShapeRange) -> dict[str, Any]:
    return {
        "shapes": shapes.as_lists(),
        "values": None if shapes.values is None else [list(held) for held in shapes.values],
    }


def read_bundle(folder: Path) -> Bundle:
    """Read the list of a bundle; its files are not looked at.

    Raises:
        UsageError: The folder is no bundle, or one of a version that this compiler does not know.
    """
    path = folder / LIST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA or content["schema_version"] != _VERSION:
            message = f"is not a {_SCHEMA} of version {_VERSION}"
            raise UsageError(message, where=str(path))
        files = tuple(_file(entry) for entry in content["files"])
        engine = content["engine"]
        return Bundle(
            str(content["qcompiler"]),
            str(content["target"]),
            _options(content["build"]),
            None if engine is None else _plain(engine),
            None if content["no_script"] is None else str(content["no_script"]),
            files,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"cannot be read as a bundle: {error}"
        hint = "name a folder that `qcompile -o NAME.qbundle` made"
        raise UsageError(message, where=str(folder), hint=hint) from error


def _file(entry: Mapping[str, Any]) -> BundledFile:
    names = [field.name for field in fields(BundledFile)]
    name, size, digest = (entry[name] for name in names)
    return BundledFile(_plain(name), int(size), str(digest))


def _plain(name: object) -> str:
    """Return a file name; ValueError where it could lead out of the folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
        message = f"{name!r} is no file name"
        raise ValueError(message)
    return name


def _options(content: Mapping[str, Any]) -> EngineOptions:
    if content["library"] not in LIBRARIES:
        message = f"no library is called {content['library']!r}"
        raise ValueError(message)
    return EngineOptions(
        library=content["library"],
        profile={name: _range(entry) for name, entry in content["profile"].items()},
        capabilities=tuple(map(str, content["capabilities"])),
        flags=tuple(map(str, content["flags"])),
        pools={str(name): int(size) for name, size in content["pools"].items()},
        optimization_level=content["optimization_level"],
        hardware_compatibility=content["hardware_compatibility"],
    )


def _range(entry: Mapping[str, Any]) -> ShapeRange:
    smallest, common, largest = (tuple(map(int, shape)) for shape in entry["shapes"])
    if entry["values"] is None:
        return ShapeRange(smallest, common, largest)
    low, middle, high = (tuple(map(int, held)) for held in entry["values"])
    return ShapeRange(smallest, common, largest, (low, middle, high))


def check_files(folder: Path, files: Sequence[BundledFile], progress: Progress) -> None:
    """Compare sizes and hashes of files with a bundle's list.

    Raises:
        ModelError: One is missing or has changed.
    """
    for expected in files:
        path = folder / expected.name
        if path.is_symlink() or not path.is_file():
            message = "a file of the bundle is missing"
            raise ModelError(message, where=str(path), hint=_DAMAGED)
        try:
            same = path.stat().st_size == expected.bytes and facts_of(path, progress) == expected
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
            raise ModelError(message, where=str(path)) from error
        if not same:
            message = "is not what the bundle was made with: its size or its hash differs"
            raise ModelError(message, where=str(path), hint=_DAMAGED)


def refuse_other_folder(folder: Path) -> None:
    """Raise UsageError where a bundle would take the place of something else.

    A bundle may be replaced, with what was built in it; one that holds other files may not.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        message = "is there already, and is no folder"
        raise UsageError(message, where=str(folder), hint="choose another -o")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        listed = {file.name for file in read_bundle(folder).files}
    except UsageError as error:
        message = "is a folder with something else in it"
        raise UsageError(message, where=str(folder), hint="choose another -o") from error
    known = {*listed, LIST, *REPORTS, *MADE_ON_DEVICE}
    others = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if others:
        message = f"is a bundle with a file that is not its own: {others[0]}"
        raise UsageError(message, where=str(folder), hint="move it away, or choose another -o")
