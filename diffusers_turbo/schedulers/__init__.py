"""Schedulers that never make the host wait for the device: knows schedulers and tensors, no pipeline."""
