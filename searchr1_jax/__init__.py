"""Reinforcement learning of language models that reason and search, in JAX."""
