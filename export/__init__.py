"""The ways into and out of the compiler: files on one side, the graph on the other."""

if __name__ != "qcompiler.export":
    message = "this is qcompiler's export: import qcompiler.export"
    raise ImportError(message)
