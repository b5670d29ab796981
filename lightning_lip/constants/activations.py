"""MaxMin: an activation of Lipschitz constant 1 that keeps the norm of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lip.checks import check_type


class MaxMin(nn.Module):
    """The larger and the smaller of each pair of channels (Chernodub & Nowicki, 2016; Anil, Lucas & Grosse, 2019).

    Channel i of the first half and channel i of the second are a pair; the larger goes to the first half. It only
    permutes elements, so its constant is *exactly* 1 and, unlike a ReLU, it loses no direction: the activation
    of choice where a certificate is trained for. A traced graph knows it by its operations, wherever they are written.

    Args:
        dim: The dimension of the channels, of even size.

    Example:
        >>> import torch
        >>> from lightning_lip import MaxMin
        >>> MaxMin()(torch.tensor([[1.0, 2.0, 3.0, -4.0]]))
        tensor([[ 3.,  2.,  1., -4.]])
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        check_type("dim", dim, int, "an integer")
        self.dim = dim

    def forward(self, inputs: Tensor) -> Tensor:
        """Return a tensor of the shape of `inputs`.

        Raises:
            ValueError: If the number of channels is odd.
        """
        if inputs.shape[self.dim] % 2:
            raise ValueError(f"MaxMin pairs channels: expected an even number of them, got {inputs.shape[self.dim]}.")
        first, second = inputs.chunk(2, self.dim)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], self.dim)

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        return f"dim={self.dim}"
