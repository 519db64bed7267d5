"""Models as graphs: reading, writing, asking questions of them."""
