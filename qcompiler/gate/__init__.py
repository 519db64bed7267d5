"""Judging a model by bounds: what is measured, what follows, and what may be to blame."""
