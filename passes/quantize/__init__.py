"""Passes that put Q/DQ nodes into the graph and choose their values."""
