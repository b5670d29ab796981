"""What is trained, and how: models, their layers as maps, peers."""
