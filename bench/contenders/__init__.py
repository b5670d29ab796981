"""What is trained: models, their layers as maps, peers."""
