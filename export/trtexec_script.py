"""A shell script that builds an engine with `trtexec`, for devices without this package."""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from qcompiler.export.tensorrt_profiles import Profiles, Shape
from qcompiler.export.to_tensorrt import EngineOptions

DEVICE_ENGINE: Final = "device.engine"
"""What an engine that is built on the device is called."""
TIMING_CACHE: Final = "timing.cache"

_SWITCHES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "REFIT": "--refit",
        "STRIP_PLAN": "--stripWeights",
        "WEIGHT_STREAMING": "--allowWeightStreaming",
        "VERSION_COMPATIBLE": "--versionCompatible",
        "EXCLUDE_LEAN_RUNTIME": "--excludeLeanRuntime",
        "SPARSE_WEIGHTS": "--sparsity=enable",
        "DIRECT_IO": "--directIO",
    }
)
_POOLS: Final[Mapping[str, str]] = MappingProxyType({"WORKSPACE": "workspace"})
_LEVELS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "NONE": "none",
        "AMPERE_PLUS": "ampere+",
        "SAME_COMPUTE_CAPABILITY": "sameComputeCapability",
    }
)
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_./-]+")
_UNSPEAKABLE: Final = frozenset("',\0")
"""Characters that `trtexec` splits at, inside of its quotes as well, or that no argument holds."""


def why_no_script(options: EngineOptions, inputs: Collection[str]) -> str | None:
    """Say what `trtexec` cannot be told; None where it can be told everything.

    Args:
        options: How the engine is built.
        inputs: The inputs whose shapes vary.
    """
    if options.library != "tensorrt":
        return "trtexec builds for TensorRT alone"
    for name in inputs:
        if _UNSPEAKABLE.intersection(name):
            return f"trtexec cannot be told of the input {name!r}"
    for kind, chosen, known in (
        ("flag", options.flags, _SWITCHES),
        ("memory pool", options.pools, _POOLS),
        ("hardware compatibility", (options.hardware_compatibility or "NONE",), _LEVELS),
    ):
        for name in chosen:
            if name not in known:
                return f"no switch of trtexec is known for the {kind} {name}"
    return None


def trtexec_arguments(options: EngineOptions, inputs: Sequence[str]) -> list[str]:
    """Return what `trtexec` is told beside files, one argument each; no shell has read them."""
    arguments = _shapes(options.profile, inputs)
    arguments += [_SWITCHES[name] for name in sorted(set(options.flags))]
    if options.pools:
        sizes = ",".join(f"{_POOLS[name]}:{size}B" for name, size in sorted(options.pools.items()))
        arguments.append(f"--memPoolSize={sizes}")
    if options.optimization_level is not None:
        arguments.append(f"--builderOptimizationLevel={options.optimization_level}")
    if options.hardware_compatibility is not None:
        level = _LEVELS[options.hardware_compatibility]
        arguments.append(f"--hardwareCompatibilityLevel={level}")
    return arguments


def _shapes(profile: Profiles, inputs: Sequence[str]) -> list[str]:
    """Return the three arguments of a profile, none where nothing varies.

    A network whose shapes are all fixed takes no shapes: `trtexec` refuses them.
    """
    if not inputs:
        return []
    ranges = [(_spoken(name), profile[name]) for name in inputs]
    return [
        "--minShapes=" + ",".join(f"{name}:{_text(shapes.smallest)}" for name, shapes in ranges),
        "--optShapes=" + ",".join(f"{name}:{_text(shapes.common)}" for name, shapes in ranges),
        "--maxShapes=" + ",".join(f"{name}:{_text(shapes.largest)}" for name, shapes in ranges),
    ]


def _spoken(name: str) -> str:
    """Return a name as `trtexec` reads it: quoted, where it has characters such as a colon."""
    return name if _PLAIN_NAME.fullmatch(name) else f"'{name}'"


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def trtexec_script(
    options: EngineOptions, inputs: Sequence[str], model: str, sums: Mapping[str, str]
) -> str:
    """Return the text of a POSIX shell script that builds an engine from a model beside it.

    Nothing but hashes, arguments in quotes, and names that this package chose goes into the text.

    Args:
        options: How the engine is built; `why_no_script` knows nothing against them.
        inputs: The inputs whose shapes vary, each with a profile.
        model: The model's file name.
        sums: SHA-256, hex, by the names of the files that the engine is made from.
    """
    arguments = " \\\n    ".join(shlex.quote(text) for text in trtexec_arguments(options, inputs))
    fields = {
        "@SUMS@": "\n".join(f"{digest}  {name}" for name, digest in sums.items()),
        "@MODEL@": model,
        "@ENGINE@": DEVICE_ENGINE,
        "@CACHE@": TIMING_CACHE,
        # Last: it alone holds names that others chose, which must not be taken for fields.
        "@ARGUMENTS@": f" \\\n    {arguments}" if arguments else "",
    }
    text = _SCRIPT
    for field, value in fields.items():
        text = text.replace(field, value)
    return text


_SCRIPT: Final = """\
#!/bin/sh
# Builds the engine of this bundle on the device that will run it.
#
#   ./build.sh                    writes @ENGINE@ beside this file
#   ./build.sh FILE               writes FILE
#   ./build.sh FILE --verbose     whatever follows FILE is handed on to trtexec
#
# Variables that it reads:
#   TRTEXEC=FILE          trtexec; without it that on PATH, or that of JetPack
#   TIMING_CACHE=FILE     measured times, which make the next build quicker (@CACHE@ here)
#   TENSORRT_MAJOR=10     for a trtexec that does not say its version
#
# It needs a POSIX shell, sha256sum and trtexec of TensorRT 10 or newer. The engine appears
# complete or not at all. `qcompile build` does the same through Python.
set -eu

fail() {
    printf 'build.sh: %s\\n' "$1" >&2
    exit "$2"
}

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
output=$here/@ENGINE@
if [ "$#" -gt 0 ]; then
    output=$1
    shift
fi
case $output in
-*) fail "the first argument is the engine's file; options follow it" 2 ;;
esac
if [ -d "$output" ]; then
    fail "the engine's file is a folder" 2
fi
cache=${TIMING_CACHE:-"$here/@CACHE@"}

# 1. The files must be those that were made: a transfer that was cut off would fail late, or not
# at all.
command -v sha256sum >/dev/null 2>&1 || fail "sha256sum is missing" 2
(cd -- "$here" && sha256sum -c -) <<'SUMS' || fail "the bundle is damaged: copy it again" 3
@SUMS@
SUMS

# 2. trtexec: JetPack does not put it on PATH.
trtexec=${TRTEXEC:-}
if [ -z "$trtexec" ]; then
    trtexec=$(command -v trtexec || printf '%s' /usr/src/tensorrt/bin/trtexec)
fi
[ -x "$trtexec" ] || fail "trtexec is not found: set TRTEXEC to its path" 2

# 3. Its version, from the line that it writes first: [TensorRT v8601] is 8.6.1, and from 10 on
# every part has two digits, as in [TensorRT v101302].
major=${TENSORRT_MAJOR:-}
if [ -z "$major" ]; then
    version=$("$trtexec" --help 2>&1 | sed -n 's/.*\\[TensorRT v\\([0-9]\\{1,9\\}\\)\\].*/\\1/p' |
        sed -n 1p)
    [ -n "$version" ] || fail "trtexec does not say its version: set TENSORRT_MAJOR" 2
    if [ "$version" -ge 100000 ]; then
        major=$((version / 10000))
    else
        major=$((version / 1000))
    fi
fi
case $major in
*[!0-9]*) fail "TENSORRT_MAJOR is no number" 2 ;;
esac
[ "$major" -ge 10 ] || fail "this is TensorRT $major; the graph needs 10 or newer" 4

# 4. Types come from the graph alone. TensorRT 10 has to be told so; later ones know no other way.
if [ "$major" -eq 10 ]; then
    set -- --stronglyTyped "$@"
fi

# 5. The build. Shapes are the smallest, the most common and the largest that the engine takes.
partial=$output.partial.$$
trap 'rm -f -- "$partial"' EXIT
trap 'exit 130' HUP INT TERM
set -- --onnx="$here/@MODEL@" --saveEngine="$partial" --timingCacheFile="$cache" \\
    --skipInference@ARGUMENTS@ \\
    "$@"
"$trtexec" "$@" || fail "trtexec could not build the engine" 4
[ -s "$partial" ] || fail "trtexec wrote no engine" 4
mv -f -- "$partial" "$output"
printf 'wrote %s\\n' "$output"
"""
