"""Build the real models that the benchmarks run, and say where they are.

python -m benchmarks.build_models [NAME ...] [--cache-dir DIR]
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.assets import AssetError
from benchmarks.models.catalog import CATALOG, RealModel


def main() -> int:
    """Build the named models, or all; return 1 if one could not be built."""
    parser = argparse.ArgumentParser(description="Build the real models that the benchmarks run.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(CATALOG)}; all by default"
    )
    parser.add_argument("--cache-dir", type=Path, help="cache folder, when not the user's own")
    arguments = parser.parse_args()
    names: list[str] = arguments.names or list(CATALOG)
    if unknown := [name for name in names if name not in CATALOG]:
        parser.error(f"no model is called {', '.join(unknown)}; there are {', '.join(CATALOG)}")
    results = [_build(CATALOG[name], arguments.cache_dir) for name in names]
    return 0 if all(results) else 1


def _build(model: RealModel, cache_dir: Path | None) -> bool:
    if not model.is_built(cache_dir) and (missing := model.missing_modules()):
        print(f"{model.name:26} not built: install {', '.join(missing)}", file=sys.stderr)
        return False
    start = time.perf_counter()
    try:
        path = model.build(cache_dir)
    except AssetError as error:
        print(f"{model.name:26} not built: {error}", file=sys.stderr)
        return False
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    print(f"{model.name:26} {size / 1e6:8.1f} MB {time.perf_counter() - start:7.1f} s  {path}")
    return True


if __name__ == "__main__":
    sys.exit(main())
