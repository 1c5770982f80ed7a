"""The families of decoders, a file each: what a family's config.json says, its tensors, its blocks, its sizes."""
