"""Real models, one per file: how each is built, fed and scored."""
