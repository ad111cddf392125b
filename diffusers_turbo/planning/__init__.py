"""Decisions: pure functions of facts. No device is asked and no pipeline is touched in this room."""
