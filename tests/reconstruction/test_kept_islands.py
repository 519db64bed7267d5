"""Islands of a Q/DQ graph take part in rounding: as floats that take up errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qcompiler.ir.islands import island_of
from qcompiler.ir.quantizable import find_sites
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.passes.reconstruct.reconstruct_blocks import (
    ReconstructBlocks,
    ReconstructBlocksOptions,
)
from qcompiler.quant.islands import IslandKind
from qcompiler.quant.reconstruction import PRESETS, Preset
from qcompiler.reconstruction.kept_islands import open_islands
from qcompiler.reconstruction.starting_point import quantize_to_start
from qcompiler.rewriting.base import PassContext
from tests.support.graphs import initializer
from tests.support.islands import Setting, calls_of, divergence, weights
from tests.support.rewrites import run_pass

_KINDS = (IslandKind.WEIGHT, IslandKind.COLUMN)


@pytest.mark.parametrize("kind", _KINDS)
def test_rounding_sees_the_whole_weight(kind: IslandKind, tmp_path: Path) -> None:
    model, _ = Setting(kind=kind).fraction(0.02).assigned(tmp_path)
    context = PassContext(WeightStore(tmp_path))
    start = quantize_to_start(model, (InsertQdq(),), context)
    islands = open_islands(start, context.store)
    for weight in start.weights:
        name = weight.name.partition(".")[0]
        whole = weight.tensor.numpy()
        np.testing.assert_allclose(whole, weights(0)[name], rtol=1e-3)
        if weight.name not in islands.masks:
            assert kind is IslandKind.COLUMN  # none of its channels was worth one
            continue
        mask = islands.masks[weight.name]
        np.testing.assert_array_equal(whole[~mask], weights(0)[name][~mask])
        codes = initializer(model, f"{weight.name}.codes").astype(int)
        zeros = np.repeat(initializer(model, f"{weight.name}.zero_point").astype(int), 16, axis=0)
        # Scales are those of a weight that is zero there.
        assert ((codes - zeros[: len(codes)]) * mask == 0).all()


@pytest.mark.parametrize("kind", _KINDS)
def test_islands_take_up_errors_of_others(kind: IslandKind, tmp_path: Path) -> None:
    setting = Setting(kind=kind).fraction(0.02)
    before, _ = setting.assigned(tmp_path)
    after = setting.rounded(tmp_path)
    (site,) = (s for s in find_sites(before)[0] if s.node.name == "up")
    island = island_of(site, before.graph)
    assert island is not None
    name = island.values.name or ""
    was, now = initializer(before, name), initializer(after, name)
    assert was.dtype == now.dtype == np.float16
    assert not np.array_equal(was, now)
    assert np.corrcoef(was.ravel(), now.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("kind", _KINDS)
def test_windows_are_learned_around_islands(kind: IslandKind, tmp_path: Path) -> None:
    setting = Setting(kind=kind).fraction(0.02)
    before, _ = setting.assigned(tmp_path)
    model, _ = setting.assigned(tmp_path)
    blocks = replace(PRESETS[Preset.FAST], steps=20)
    options = ReconstructBlocksOptions(calls_of(0, 0), (InsertQdq(),), blocks)
    run_pass(ReconstructBlocks(options), model, tmp_path)
    (site,) = (s for s in find_sites(before)[0] if s.node.name == "up")
    island = island_of(site, before.graph)
    assert island is not None
    name = island.values.name or ""
    np.testing.assert_array_equal(initializer(before, name), initializer(model, name))
    assert divergence(model, 0, 0) < divergence(Setting().rounded(tmp_path), 0, 0)
