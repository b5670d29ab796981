"""What a forward pass shows of a model: which parameters multiply activations, and what normalises their products."""
