"""Passes that choose codes by what they do to the outputs of ops and blocks."""
