"""The ways of doing the work of a scenario, a file for each library or family."""
