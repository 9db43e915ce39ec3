"""A training run: its data, weights by epoch, network and class schedule."""
