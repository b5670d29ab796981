"""A layer's weight as a linear map: what it is, what it is not, which layers are meant."""
