"""What stands in for a module's `forward` so that a fused kernel does its work: plain data, copied with the module."""
