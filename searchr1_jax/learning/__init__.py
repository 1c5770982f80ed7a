"""Learning: losses, advantages, and the jitted update."""
