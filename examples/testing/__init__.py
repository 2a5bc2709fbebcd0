"""Testing a graph: steps replaced, a fake clock, and a kill at every boundary."""
