"""Scenarios, one folder each; every one runs with one command: ``python -m examples.parallel``."""
