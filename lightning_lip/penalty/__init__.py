"""From norms to a scalar, and its gradient back to the weights."""
