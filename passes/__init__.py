"""The graph rewrites, one per file, grouped by the stage they lead to."""

if __name__ != "qcompiler.passes":
    message = "these are qcompiler's passes: import qcompiler.passes"
    raise ImportError(message)
