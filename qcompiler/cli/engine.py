"""Options of an engine: the same for every command that builds one."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qcompiler.byte_sizes import parse_size
from qcompiler.cli.options import MODEL, Decorator

if TYPE_CHECKING:
    from qcompiler.export.to_tensorrt import EngineOptions

_VALUES = (
    *("profiles", "sm", "builder_flags", "workspace", "builder_level"),
    *("hardware_compatibility", "timing_cache", "builder_memory", "builder_python"),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say whether and how an engine is built."""
    decorators: list[Decorator] = [
        click.option(
            "--engine",
            type=MODEL,
            metavar="FILE",
            help="Also build an engine, for targets that have them; -o FILE.engine does the same.",
        ),
        click.option(
            "--profile",
            "profiles",
            multiple=True,
            metavar="IN:MIN..OPT..MAX",
            help="Shapes of an input, as x:1x16..8x128..64x512; x may have * in it.  [default: the "
            "samples']",
        ),
        click.option(
            "--sm", metavar="86,89", help="Processors of the engine.  [default: the library's own]"
        ),
        click.option(
            "--builder-flag",
            "builder_flags",
            multiple=True,
            metavar="FLAG",
            help="refit, strip-plan, weight-streaming, version-compatible ... Repeatable.",
        ),
        click.option("--workspace", metavar="SIZE", help="Memory of the engine's kernels."),
        click.option(
            "--builder-level", type=click.IntRange(0, 5), help="How long the builder searches."
        ),
        click.option(
            "--hardware-compatibility", metavar="LEVEL", help="ampere-plus ... (TensorRT)."
        ),
        click.option(
            "--timing-cache", type=MODEL, metavar="FILE", help="Timings to keep and to reuse."
        ),
        click.option(
            "--builder-memory", metavar="SIZE", help="End the building process beyond so much."
        ),
        click.option(
            "--builder-python",
            type=MODEL,
            metavar="FILE",
            help="An interpreter that has the library.  [default: this one]",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def engine_options_of(values: dict[str, Any]) -> "EngineOptions":
    """Take the values of `engine_options` but the file out of a command's.

    Raises:
        UsageError: A value cannot be used.
    """
    from qcompiler.export.tensorrt_profiles import parse_profile
    from qcompiler.export.to_tensorrt import EngineOptions, capability_of

    taken = {name: values.pop(name) for name in _VALUES}
    level, workspace = taken["hardware_compatibility"], taken["workspace"]
    memory = taken["builder_memory"]
    return EngineOptions(
        profile=dict(parse_profile(text) for text in taken["profiles"]),
        capabilities=tuple(capability_of(text) for text in (taken["sm"] or "").split(",") if text),
        flags=tuple(_name(flag) for flag in taken["builder_flags"]),
        pools={} if workspace is None else {"WORKSPACE": parse_size(workspace)},
        optimization_level=taken["builder_level"],
        hardware_compatibility=None if level is None else _name(level),
        timing_cache=taken["timing_cache"],
        memory_limit=None if memory is None else parse_size(memory),
        python=taken["builder_python"],
    )


def _name(text: str) -> str:
    """Return a name of the library's API: "weight-streaming" is WEIGHT_STREAMING."""
    return text.strip().upper().replace("-", "_")
