"""``make demo``: real servers, a real worker, a killed pool process, and what the database says of it."""
