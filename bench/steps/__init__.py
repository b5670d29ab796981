"""Whole training steps, in turn (`lightning-lip bench`)."""
