"""Benchmarks: one script per question, run on real models that ship in Python packages."""
