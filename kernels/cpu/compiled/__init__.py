"""What is compiled: addresses only."""
