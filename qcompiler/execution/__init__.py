"""Running graphs, and seeing what a runtime makes of them."""
