"""The targets that exist, by name."""

from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

from qcompiler.errors import UsageError
from qcompiler.targets.capability import Target
from qcompiler.targets.emulation import EMULATION
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from qcompiler.targets.processors import processor_of
from qcompiler.targets.tensorrt import TENSORRT_10, TENSORRT_11, TENSORRT_RTX

TARGETS: Final = MappingProxyType(
    {
        target.name: target
        for target in (ONNXRUNTIME, TENSORRT_10, TENSORRT_11, TENSORRT_RTX, EMULATION)
    }
)

ALIASES: Final = MappingProxyType({"tensorrt": TENSORRT_11.name})
"""The newest release of what has several."""


def find_target(name: str) -> Target:
    """Return the target called `name`.

    Processors follow a colon: "tensorrt-rtx:sm86,sm89" is TensorRT-RTX for these two. They are a
    part of the name, since whatever takes, keeps or repeats the name of a target then has them.

    Raises:
        UsageError: There is none, or it knows no such processor; the message gives the nearest
            names, or all of them.
    """
    base, _, processors = name.partition(":")
    found = TARGETS.get(ALIASES.get(base, base))
    if found is None:
        names = [*TARGETS, *ALIASES]
        nearest = get_close_matches(base, names, n=3, cutoff=0.4) or sorted(names)
        message = f"there is no target {base!r}"
        raise UsageError(message, hint=f"known: {', '.join(nearest)}")
    return _for_processors(found, processors.split(",")) if processors else found


def _for_processors(target: Target, names: list[str]) -> Target:
    if not target.known_processors:
        message = f"{target.title} runs on any processor"
        raise UsageError(message, hint=f"write --target {target.name}")
    chosen = {processor_of(name, target.known_processors) for name in names}
    processors = tuple(one for one in target.known_processors if one in chosen)
    labels = ",".join(one.name.lower() for one in processors)
    return replace(target, name=f"{target.name}:{labels}", processors=processors, tuned=True)
