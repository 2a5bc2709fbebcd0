"""Real servers, workers and Flower for tests, over local processes or Docker."""
