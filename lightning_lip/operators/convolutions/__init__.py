"""Convolutions as linear operators: by their symbol, or at the size of their input."""
