"""Triton: who owns buffers and tables, and what is compiled."""
