"""Measuring configurations of a pipeline against each other: speed, memory and distance, as data, tables and plots."""
