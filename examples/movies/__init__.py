"""A batch: figures over all movies, then each movie beside them."""
