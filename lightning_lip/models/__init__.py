"""The user's network: walked, called, and left as it was."""
