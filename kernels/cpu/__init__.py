"""Numba: who owns buffers, threads and tables."""
