"""Four ways a step can end: a result, an error not worth repeating, retries used up, and the end of the graph."""
