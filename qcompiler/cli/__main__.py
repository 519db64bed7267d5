"""`python -m qcompiler.cli` is `qcompile`."""

from qcompiler.cli.main import main

main()
