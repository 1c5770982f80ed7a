"""The policy and the value model, and their weights on disk."""
