"""Passes that turn a Q/DQ graph into the form a target runs fastest."""
