"""The last release, which a model must not be worse than."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import UsageError
from qcompiler.ir.fingerprint import fingerprint
from qcompiler.report.files import read_manifest
from qcompiler.report.verdict import SCHEMA, Recorded, recorded


@dataclass(frozen=True, slots=True)
class Release:
    """The last release.

    Attributes:
        name: Its file.
        path: The file, if it lies beside its manifest as it was released: it is then measured
            anew, on the same samples and the same machine. Else None.
        recorded: What was measured when it was released, None if nothing was.
    """

    name: str
    path: Path | None
    recorded: Recorded | None


def open_release(path: Path) -> Release:
    """Read the manifest of a release, or the JSON that a gate wrote.

    Raises:
        UsageError: It is neither, or says nothing that could be compared.
    """
    content = _read(path)
    if content.get("schema") == SCHEMA:
        found = recorded(content, path)
        return Release(found.name, None, found)
    manifest = read_manifest(path)
    model = path.with_name(Path(manifest.output.name).name)
    present = model.is_file() and fingerprint(model) == manifest.output.sha256
    earlier = None
    if manifest.gate:
        earlier = Recorded(
            manifest.output.name,
            manifest.input.sha256,
            str(manifest.gate.get("data_sha256", "")),
            dict(manifest.gate.get("measured", {})),
        )
    sizes: dict[str, float | None] = {"size": float(manifest.output.bytes)}
    if earlier is None:
        earlier = Recorded(manifest.output.name, manifest.input.sha256, "", sizes)
    return Release(manifest.output.name, model if present else None, earlier)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise UsageError(message, where=str(path), hint="baseline names a manifest") from error
    except ValueError as error:
        message = f"is no JSON: {error}"
        raise UsageError(message, where=str(path), hint="baseline names a manifest") from error
    if not isinstance(content, dict):
        message = "is neither a manifest nor what a gate wrote"
        raise UsageError(message, where=str(path))
    return content
