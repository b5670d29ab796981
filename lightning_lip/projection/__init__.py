"""From norms to caps, and the weights within them."""

from lightning_lip.projection.caps import Caps, bound_caps, joint_caps, log_clip_caps, per_layer_caps, scale_factors

__all__ = ["Caps", "bound_caps", "joint_caps", "log_clip_caps", "per_layer_caps", "scale_factors"]
