"""Running passes: stages, what is legal in each, verification, reproducers."""
