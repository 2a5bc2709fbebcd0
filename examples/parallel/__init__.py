"""Three services asked at once, because nothing in the types says that one must wait for another."""
