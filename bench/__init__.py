"""Measurements: run each as a module from the checkout, ``python -m bench.kernels``."""
