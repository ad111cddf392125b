"""Modules compiled ahead of time: what a file was made for, how it is written and read, and the call that runs it."""
