"""Rewrites that move range between activations and weights, exact in real arithmetic."""
