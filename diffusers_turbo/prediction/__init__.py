"""The peak memory of a pipeline's stages before it runs: its own code on the meta device, and the allocator's rules."""
