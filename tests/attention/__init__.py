"""Tests of the attention processors."""
