"""Everything that is only text: tags, prompts, rewards, tokens and their bytes. Knows no JAX."""
