"""The smallest graph: one step, from a Name to a Greeting."""
