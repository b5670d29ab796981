"""Convolutions: what their penalty costs by norm, how closely the symbol is followed, and what is certified after."""
