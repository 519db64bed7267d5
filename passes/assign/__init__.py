"""Passes that write a plan on the nodes and change nothing else."""
