"""`qcompile --list`: what exists."""

from collections.abc import Iterator


def lines_of(kind: str) -> Iterator[str]:
    """Yield the lines of one list: passes, targets or schemes."""
    if kind == "passes":
        yield from _passes()
    elif kind == "targets":
        yield from _targets()
    else:
        yield from _schemes()


def _passes() -> Iterator[str]:
    from qcompiler.pipeline import PASSES

    for name, rewrite in PASSES.items():
        summary = (rewrite.__doc__ or "").strip().splitlines()[0]
        stages = f"{rewrite.consumes} -> {rewrite.produces}"
        yield f"{name:28} {stages:24} {rewrite.numerics:10} {summary}"


def _targets() -> Iterator[str]:
    from qcompiler.targets.registry import TARGETS

    for target in TARGETS.values():
        yield f"{target.name:16} {target.title}; default scheme {target.default_scheme}"


def _schemes() -> Iterator[str]:
    from qcompiler.quant.scheme import QScheme

    table = (QScheme.__doc__ or "").splitlines()
    yield from (line.strip() for line in table if line.strip().startswith("|"))
    yield "Block sizes are powers of two from 16; :sym and :asym fix the zero point."
    yield "`float` leaves an op alone; `float16` and `bfloat16` cast the whole model."
