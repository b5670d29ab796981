"""Popular models that nobody here wrote, trained with the callbacks at their defaults (`make zoo`)."""
