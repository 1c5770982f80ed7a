"""A run: its directory, its parts made from settings, checkpoints, metrics, evaluation."""
