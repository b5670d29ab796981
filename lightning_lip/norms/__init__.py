"""Norms estimated from below, by blocks of vectors that persist from step to step."""
