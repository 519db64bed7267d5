"""Real models for tests: the one way in which a test gets them."""

import os
from pathlib import Path

import pytest

from benchmarks.assets import AssetError
from benchmarks.models.catalog import CATALOG


class RealModelUnavailableError(Exception):
    """A real model cannot be had here; the message is a reason to skip."""


def real_model(name: str) -> Path:
    """Return the path of a real model, for a test that cannot do without it.

    Where it cannot be had the test is skipped with the reason; under `CI=true` it fails instead.

    Args:
        name: A name of `benchmarks.models.catalog.CATALOG`: `silero_vad_op18_ifless`, `silero_vad`,
            `cifar_cnn`, `minilm`, `smollm2_raw`, `smollm2_folded`, ...
    """
    try:
        return find_real_model(name)
    except RealModelUnavailableError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must not skip this test: {error}")
        pytest.skip(str(error))


def find_real_model(name: str, cache_dir: Path | None = None) -> Path:
    """Return the path of a real model: from the cache, or fetched and built now.

    Raises:
        KeyError: No model has this name.
        RealModelUnavailableError: The package cannot be fetched, or building it takes a module
            that is not installed.
    """
    if name not in CATALOG:
        message = f"no real model is called {name!r}; there are {', '.join(CATALOG)}"
        raise KeyError(message)
    model = CATALOG[name]
    if not model.is_built(cache_dir) and (missing := model.missing_modules()):
        message = f"{name} is not built, and building it needs {', '.join(missing)}"
        raise RealModelUnavailableError(message)
    try:
        return model.build(cache_dir)
    except AssetError as error:
        raise RealModelUnavailableError(str(error)) from error
