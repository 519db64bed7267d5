"""Numbers of bytes as people write them."""

import re

from qcompiler.errors import UsageError


def parse_size(text: str) -> int:
    """Read a number of bytes such as "512MiB", "2GB" or "1000000".

    Raises:
        UsageError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        message = f"{text!r} is no size"
        raise UsageError(message, hint="write it like 512MiB or 2GB")
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper() or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)
