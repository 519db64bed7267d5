"""Variants of real models with outlier channels planted in, which compute the same."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
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


def plant_outliers(source: Path, output: Path, seed: int = 0) -> int:
    """Write a model with some channels scaled up and their readers down; return how many channels.

    They are those behind norms where the model has norms whose channels can be scaled (a norm
    without a weight gets one), else those between linear ops or convolutions.
    """
    model = load_model(source)
    generator = np.random.default_rng(seed)
    planted = 0
    with TemporaryDirectory() as folder, WeightStore(Path(folder)) as store:
        context = PassContext(store)
        passes = pipeline(make_plan(CompileOptions(scheme="w8a16")))
        names = [each.name for each in passes]
        PassManager(context).run(model, passes[: names.index(AssignSchemes.name)])
        taken = value_names(model)
        for group in _groups(model):
            scales = np.ones(group.count)
            count = max(1, round(SHARE * group.count))
            chosen = generator.choice(group.count, count, replace=False)
            scales[chosen] = 1 / generator.uniform(SMALLEST, LARGEST, count)
            scale_group(group, scales, store, taken, "plant-outliers")
            planted += count
        save_model(model, output, progress=SilentProgress())
    return planted


def _groups(model: ir.Model) -> list[ChannelGroup]:
    sites, _ = find_sites(model)
    groups, refusals = find_groups(sites, sites)
    behind = [group_behind_mul(r.data, r.readers) for r in refusals if is_bare_norm(r.data)]
    norms = [group for group in behind if isinstance(group, ChannelGroup)]
    return norms or groups
