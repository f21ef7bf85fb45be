"""Many workers in one process: all of them at once on the vectorized engine, and what time they would take apart."""
