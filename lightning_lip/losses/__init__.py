"""Losses in which the network's Lipschitz bound enters the logits."""
