"""A network's bound as a function of its norms."""
