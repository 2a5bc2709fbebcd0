"""A step that is an object: its client and its settings are injected once, and replaced in tests."""
