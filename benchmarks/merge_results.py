"""Puts results that were measured elsewhere into a results file, and writes its tables again.

    python -m benchmarks.merge_results reconstruction_smollm2 FOLDER/reconstruction.json ...

The file's own record of machine and versions stays, or is that of the first one where there is no
file yet; every arm that is taken over names the processor it was measured on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import equalization, islands, reconstruction, reconstruction_peers
from benchmarks.arguments import benchmark_parser
from benchmarks.results_file import FOLDER, Results

TABLES: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "equalization": equalization.markdown,
    "islands": islands.markdown,
    "reconstruction": reconstruction.markdown,
    "reconstruction_smollm2": reconstruction.markdown,
    "reconstruction_peers": reconstruction_peers.markdown,
}


def merge(name: str, files: Sequence[Path], folder: Path) -> None:
    """Merge files, in their order, into a results file."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    path = folder / f"{name}.json"
    base = json.loads(path.read_text(encoding="utf-8")) if path.exists() else contents[0]
    results = Results([], folder, name)
    results.content |= {key: base[key] for key in ("machine", "versions")}
    for content in contents:
        results.take_over(content)
    results.write()
    results.markdown.write_text(TABLES[name](results.content), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("name", choices=TABLES)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    chosen = parser.parse_args(arguments)
    merge(chosen.name, chosen.files, chosen.folder)


if __name__ == "__main__":
    main()
