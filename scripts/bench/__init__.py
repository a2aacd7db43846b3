"""What the benchmark drivers of this folder's parent are made of."""
