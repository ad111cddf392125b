"""What is true: of the device, of the packages beside it, and of the pipeline. Rooms here only read."""
