"""The command line: parses into the values that the library takes, and prints what it returns."""
