"""Results as trees of npy files, the format of older scripts: written, read, imported."""
