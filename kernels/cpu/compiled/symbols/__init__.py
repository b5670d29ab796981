"""What is compiled for the symbols of convolutions: addresses only."""
