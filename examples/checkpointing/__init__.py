"""A long pipeline whose process is killed: what a second execution costs with checkpoints, and what without."""
