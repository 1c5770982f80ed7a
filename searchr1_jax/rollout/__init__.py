"""Acting: KV caches, the jitted decode and extend programs, and the host loop around them."""
