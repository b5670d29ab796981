"""Convolutions as linear operators: by their symbol on the infinite grid, or at the size of their input."""
