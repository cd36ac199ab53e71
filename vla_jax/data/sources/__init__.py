"""Episodes on the disk: how they are written, opened and read."""
