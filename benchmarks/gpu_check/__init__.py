"""`make gpu-check`: what only a GPU can answer, in one call of under eight minutes, without a network."""
