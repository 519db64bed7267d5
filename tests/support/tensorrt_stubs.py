"""The types of TensorRT's API, for checking code against it where the library is not installed.

The package depends on the library, so it is taken apart, not installed.
"""

import ast
import os
import re
from pathlib import Path

import pytest

from benchmarks.assets import AssetError, package_file
from benchmarks.packages import Package, PackageFile

STUBS = Package(
    name="tensorrt-stubs",
    version="10.13.0.35.1",
    sha256="749a36a1f825db0800a82d0dabbf7ef49f3a9edc1e794c9545fb94a551613fea",
    files=(
        PackageFile(
            "tensorrt/__init__.pyi",
            "c8bca8be1e369901c7608337e4c4614a896a68fe39ecc512f87cc803153567c6",
            name="names.pyi",
        ),
        PackageFile(
            "tensorrt_bindings/__init__.pyi",
            "277270f375579f2904513880661740d95fdea31d233f5edf876079d2d782fb1a",
            name="bindings.pyi",
        ),
        PackageFile(
            "tensorrt_bindings/tensorrt.pyi",
            "b4cabd654492d265b7d9f96f16494102575c4d17cde7d94e99aae1fcaacf7d92",
            name="api.pyi",
        ),
    ),
)
_METHOD = re.compile(r"( *)def (\w+)\(.*\) -> .*:$")


def write_stubs(folder: Path) -> None:
    """Lay the stubs out below a folder as packages `tensorrt` and `tensorrt_bindings`.

    Where they cannot be had the test is skipped with the reason; under `CI=true` it fails instead.
    """
    try:
        names, bindings, api = (package_file(STUBS, f"{n}.pyi") for n in _NAMES)
    except AssetError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must not skip this test: {error}")
        pytest.skip(str(error))
    for package in ("tensorrt", "tensorrt_bindings"):
        (folder / package).mkdir()
    (folder / "tensorrt" / "__init__.pyi").write_text(names.read_text(encoding="utf-8"))
    (folder / "tensorrt_bindings" / "__init__.pyi").write_text(bindings.read_text(encoding="utf-8"))
    lines = api.read_text(encoding="utf-8").splitlines()
    (folder / "tensorrt_bindings" / "tensorrt.pyi").write_text("\n".join(map(_readable, lines)))


_NAMES = ("names", "bindings", "api")


def _readable(line: str) -> str:
    """Return a line of the stubs; a method that Python cannot parse takes and gives anything.

    The generator left keywords as names of arguments, and arguments without a default behind some
    with one.
    """
    found = _METHOD.fullmatch(line)
    if found is None:
        return line
    try:
        ast.parse(f"{line.strip()} ...")
    except SyntaxError:
        return f"{found[1]}def {found[2]}(self, *_: typing.Any, **__: typing.Any) -> typing.Any:"
    return line
