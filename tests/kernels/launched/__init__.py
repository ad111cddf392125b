"""Tests that launch kernels: on a GPU, or through Triton's interpreter in a process of its own."""
