"""Exact rewrites that bring an imported model into the one form later passes expect."""
