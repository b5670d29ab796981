"""What the commands share: console, documents, optional packages, progress, processes."""
