"""The four regimes of the paper's Table 1."""
