"""A layer's weight as a linear map: which layers have one, which are refused, and which are selected."""
