"""What each runtime can run, as tables."""
