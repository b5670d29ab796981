"""Ways to share one certified budget."""
