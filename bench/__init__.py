"""What the penalty costs, and what it gives for that."""

from lightning_lip.bench.command import bench

__all__ = ["bench"]
