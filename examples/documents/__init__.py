"""A value is split in mid-graph, its parts are worked on, and an aggregate merges them."""
