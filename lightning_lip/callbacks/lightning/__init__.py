"""What a callback asks of a Trainer, for either package."""
