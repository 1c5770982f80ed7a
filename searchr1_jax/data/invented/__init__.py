"""The invented world: people and companies, questions about them, passages that mislead."""
