"""Compiled calls that people can live with: counted, for all sizes, kept on disk, and left when they fail."""
