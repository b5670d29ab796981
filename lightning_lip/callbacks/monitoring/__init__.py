"""What a monitor measures, remembers, and tells at the end."""
