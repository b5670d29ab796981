"""One question a module: `python -m lightning_lip.bench.studies.kernels`."""
