"""How fast a meta-gradient, a training and its start are, beside what others make of the same: `make benchmark`."""
