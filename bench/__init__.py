"""What the penalty costs in whole training steps, as `lightning-lip bench` measures it.

Importing this package imports neither torch nor Lightning.
"""

from lightning_lip.bench.command import bench

__all__ = ["bench"]
