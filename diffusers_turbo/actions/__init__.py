"""What is done to pipelines: each file applies one kind of change and returns the journal that undoes it."""
