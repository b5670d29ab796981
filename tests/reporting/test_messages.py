"""What is told for information: once, on the first rank."""

import torch

from lightning_lip.reporting.messages import tell


def test_the_first_rank_alone_tells(told, monkeypatch):
    tell("hello")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1, 2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        tell(f"rank {rank}")
    assert told == ["hello", "rank 0"]
