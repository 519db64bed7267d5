"""Variants of real models with outlier channels planted in, which compute the same."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.channels.groups import ChannelGroup, find_groups, group_behind_mul
from qcompiler.ir.channels.scaling import scale_group
from qcompiler.ir.editing import value_names
from qcompiler.ir.load import load_model
from qcompiler.ir.quantizable import find_sites
from qcompiler.ir.save import save_model
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions
from qcompiler.passes.assign.assign_schemes import AssignSchemes
from qcompiler.passes.equalize.equalize_channels import is_bare_norm
from qcompiler.pipeline import pipeline
from qcompiler.plan import make_plan
from qcompiler.progress import SilentProgress
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager

SHARE: Final = 0.01
"""Of the channels of a group, which become outliers; one at least."""
SMALLEST: Final = 10.0
LARGEST: Final = 100.0
"""By how much they grow."""

JITTER: Final = 0.02
"""By how much every channel may grow or shrink where only the rounding is to change."""

OVERFLOW: Final = 2.0**18
"""By how much a channel grows that is to leave float16: a power of two, so nothing is rounded."""
_EVERY: Final = 4
"""Of the groups of a model, one in so many gets such a channel."""

_Scales = Callable[[int], npt.NDArray[np.float64]]


def plant_outliers(source: Path, output: Path, seed: int = 0) -> int:
    """Write a model with some channels scaled up and their readers down; return how many channels.

    They are those behind norms where the model has norms whose channels can be scaled (a norm
    without a weight gets one), else those between linear ops or convolutions.
    """
    generator = np.random.default_rng(seed)

    def scales(channels: int) -> npt.NDArray[np.float64]:
        found = np.ones(channels)
        count = max(1, round(SHARE * channels))
        chosen = generator.choice(channels, count, replace=False)
        found[chosen] = 1 / generator.uniform(SMALLEST, LARGEST, count)
        return found

    return _plant(source, output, scales, every=1)


def redraw_rounding(source: Path, output: Path, seed: int) -> int:
    """Write a model in which every channel is scaled by at most 2 %; return how many are.

    It computes the same and is as hard to quantize, but each weight rounds another way. What is
    measured of several such models tells how much of a difference is the luck of the rounding.
    """
    generator = np.random.default_rng(seed)

    def scales(channels: int) -> npt.NDArray[np.float64]:
        return generator.uniform(1 - JITTER, 1 + JITTER, channels)

    return _plant(source, output, scales, every=1)


def plant_overflow(source: Path, output: Path, seed: int = 0) -> int:
    """Write a model in which some channels leave the range of float16; return how many.

    One channel of one in four groups grows by 2^18, and what reads it shrinks by as much, exactly.
    """
    generator = np.random.default_rng(seed)

    def scales(channels: int) -> npt.NDArray[np.float64]:
        found = np.ones(channels)
        found[generator.integers(channels)] = 1 / OVERFLOW
        return found

    return _plant(source, output, scales, every=_EVERY)


def _plant(source: Path, output: Path, scales_of: _Scales, *, every: int) -> int:
    """Divide channels of one in `every` group by their scales; return how many change."""
    model = load_model(source)
    planted = 0
    with TemporaryDirectory() as folder, WeightStore(Path(folder)) as store:
        context = PassContext(store)
        passes = pipeline(make_plan(CompileOptions(scheme="w8a16")))
        names = [each.name for each in passes]
        PassManager(context).run(model, passes[: names.index(AssignSchemes.name)])
        taken = value_names(model)
        for group in _groups(model)[::every]:
            scales = scales_of(group.count)
            scale_group(group, scales, store, taken, "plant-outliers")
            planted += int((scales != 1).sum())
        save_model(model, output, progress=SilentProgress())
    return planted


def _groups(model: ir.Model) -> list[ChannelGroup]:
    sites, _ = find_sites(model)
    groups, refusals = find_groups(sites, sites)
    behind = [group_behind_mul(r.data, r.readers) for r in refusals if is_bare_norm(r.data)]
    norms = [group for group in behind if isinstance(group, ChannelGroup)]
    return norms or groups
