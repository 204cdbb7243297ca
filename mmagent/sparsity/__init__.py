"""Which weights to drop: patterns ranked over all layers, and when they are dropped."""
