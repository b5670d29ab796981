"""The same function with a smaller product."""

from lightning_lip.rebalancing.rescaling import Rebalanced, RebalancedLayer, rebalance

__all__ = ["Rebalanced", "RebalancedLayer", "rebalance"]
