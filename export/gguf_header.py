"""Values in the header of a GGUF file."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader


def header(reader: "GGUFReader", key: str) -> Any:
    """Return a value of the header, or None if it has none of this key."""
    field = reader.get_field(key)
    return None if field is None else field.contents()
