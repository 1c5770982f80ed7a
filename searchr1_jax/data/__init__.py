"""Questions in (world, TFDS builder, grain stream) and trajectories out (packed batches)."""
