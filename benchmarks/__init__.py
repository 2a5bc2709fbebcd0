"""What a run, a step and a task cost, beside the peers and the work written by hand. Nothing here decides a test."""
