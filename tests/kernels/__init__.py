"""Tests of the Triton kernels; conftest.py says where those that launch one are run."""
