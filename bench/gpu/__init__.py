"""One visit to a machine with a GPU: all that cannot be known without one, measured within a budget of seconds."""
