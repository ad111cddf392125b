"""CUDA graphs of single modules: what they are keyed by, when they are out of date, how they are kept and replayed."""
