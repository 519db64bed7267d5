"""Channels of values that can be scaled, or moved, without changing what a model computes."""
