"""Information for the user while a program runs, as Lightning gives its own."""

from __future__ import annotations

import torch
from lightning_utilities.core import rank_zero


def tell(text: str) -> None:
    """Log a text for information, on the first rank only, with the logger of Lightning's own messages."""
    # Outside of Lightning the number of the rank may be known to torch only.
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    rank_zero.rank_zero_info(text)
