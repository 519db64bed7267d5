"""Quantization types and arithmetic on NumPy arrays. Knows no graph."""
